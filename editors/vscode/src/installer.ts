// Installs the server from the wheel in this extension: one question, then progress that the user can cancel.

import { access, readdir, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import * as vscode from "vscode";
import { type Build, CancelledError, downloadSize, findTool, type Installing, run, toDoing, toSteps } from "./install";
import type { Messages } from "./messages";
import { onPath, programIn } from "./program";
import { childSurroundings, untrustedFolders } from "./workspace";

export type Answer = "installed" | "locate" | "later" | "closed" | "failed";

const INSTALL = "Install";
const INSTALL_CUDA = "Install for NVIDIA GPU";
const LOCATE = "Locate...";
const LATER = "Not Now";

export class Installer {
  private busy = false;

  /** `folder` is where the server goes, `parts` the extension's folder with the wheel. */
  constructor(
    private readonly folder: string,
    private readonly parts: string,
    private readonly log: vscode.LogOutputChannel,
    private readonly messages: Messages,
  ) {}

  /** The program that `install` makes. */
  get program(): string {
    return programIn(this.folder, process.platform);
  }

  /** Ask once whether to install the server, and install it. */
  async install(): Promise<Answer> {
    const build = await this.ask();
    if (build === "locate" || build === "later" || build === "closed") {
      return build;
    }
    const wheel = await this.findWheel();
    const tool = await this.findTool();
    if (wheel === undefined || tool === undefined) {
      return "failed";
    }
    if (this.busy) {
      this.messages.inform("The installation is running already.");
      return "closed";
    }
    this.busy = true;
    try {
      return await this.carryOut(tool, build, wheel);
    } finally {
      this.busy = false;
    }
  }

  private async findWheel(): Promise<string | undefined> {
    const files = await readdir(this.parts).catch(() => []);
    const wheel = files.find((file) => file.endsWith(".whl"));
    if (wheel === undefined) {
      this.messages.error(`The server's wheel is missing. Build it in ${this.parts}: npm run wheel`, ["locate", "log"]);
    }
    return wheel === undefined ? undefined : join(this.parts, wheel);
  }

  private async findTool(): Promise<Installing | undefined> {
    const path = process.env["PATH"] ?? "";
    const tool = await findTool(path, process.platform, untrustedFolders(), childSurroundings());
    if (tool === undefined) {
      this.messages.error(
        "Python 3.11 or uv is needed. Install one of them (Python with its module venv), then start VS Code again: it " +
          "searches the PATH that it was started with.",
        ["locate", "close"],
      );
    }
    return tool;
  }

  /** The one question. Nothing is downloaded before its answer, and no program is searched for. */
  private async ask(): Promise<Build | "locate" | "later" | "closed"> {
    const hasGpu = hasNvidiaGpu();
    const ofGpu = hasGpu ? ` (${downloadSize("cuda")} for an NVIDIA GPU)` : "";
    const index = this.index() || "PyTorch";
    const text =
      `Install the completion server? It downloads ${downloadSize("cpu")}${ofGpu}. ` +
      `Torch comes from ${index} and other packages from PyPI, with uv or Python. They go into the extension's own ` +
      "folder (1.2 GB on the disk for the CPU); your code stays on this machine.";
    const choices = [INSTALL, ...(hasGpu ? [INSTALL_CUDA] : []), LOCATE, LATER];
    const answer = await vscode.window.showInformationMessage(text, ...choices);
    if (answer === INSTALL || answer === INSTALL_CUDA) {
      return answer === INSTALL ? "cpu" : "cuda";
    }
    if (answer === LOCATE) {
      return "locate";
    }
    return answer === LATER ? "later" : "closed"; // also closed by the same question, asked again
  }

  private async carryOut(tool: Installing, build: Build, wheel: string): Promise<Answer> {
    const options = { location: vscode.ProgressLocation.Notification, title: "fimserver", cancellable: true };
    const steps = toSteps({ ...tool, build, wheel, index: this.index() }, this.folder, process.platform);
    const earlier = `${this.folder}.earlier`; // kept until the new one is complete
    try {
      await vscode.window.withProgress(options, async (progress, token) => {
        const abort = new AbortController();
        token.onCancellationRequested(() => abort.abort());
        await rm(earlier, { recursive: true, force: true });
        await rename(this.folder, earlier).catch(ignoreMissing);
        for (const [number, step] of steps.entries()) {
          const title = `${step.title} (${number + 1} of ${steps.length})`;
          progress.report({ message: title });
          this.log.info(`${step.command} ${step.args.join(" ")}`);
          const onLine = (line: string): void => {
            this.log.info(line);
            const doing = toDoing(line);
            if (doing !== undefined) {
              progress.report({ message: `${title}: ${doing}` });
            }
          };
          await run(step, childSurroundings(), onLine, abort.signal);
          progress.report({ increment: 100 / steps.length });
        }
        await access(this.program);
      });
      await rm(earlier, { recursive: true, force: true }).catch(() => undefined);
      return "installed";
    } catch (error) {
      await this.restore(earlier);
      if (error instanceof CancelledError) {
        return "closed";
      }
      const why = error instanceof Error ? error.message : String(error);
      this.messages.error(`The server could not be installed. ${why}`, ["install", "log"]);
      return "failed";
    }
  }

  private index(): string {
    return vscode.workspace.getConfiguration("fimserver").get("torchIndex", "").trim();
  }

  /** Put the earlier server back, if there was one. */
  private async restore(earlier: string): Promise<void> {
    try {
      await rm(this.folder, { recursive: true, force: true });
      await rename(earlier, this.folder).catch(ignoreMissing);
    } catch (error) {
      this.log.warn(`the earlier server stays in ${earlier}: ${error instanceof Error ? error.message : error}`);
    }
  }
}

function ignoreMissing(error: NodeJS.ErrnoException): void {
  if (error.code !== "ENOENT") {
    throw error;
  }
}

function hasNvidiaGpu(): boolean {
  return onPath("nvidia-smi", process.env["PATH"] ?? "", process.platform, untrustedFolders()) !== undefined;
}
