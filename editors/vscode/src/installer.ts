// Asks how to install the server, shows the progress, and lets the user cancel.

import { access, rm } from "node:fs/promises";
import * as vscode from "vscode";
import {
  type Build,
  buildsFor,
  CancelledError,
  type Choice,
  downloadSize,
  findTools,
  IS_PUBLISHED,
  isCheckout,
  run,
  toSteps,
} from "./install";
import type { Messages } from "./messages";
import { isInside } from "./outside";
import { programIn } from "./program";
import { childSurroundings, untrustedFolders } from "./workspace";

const BUILDS: Readonly<Record<Build, { label: string; detail: string }>> = {
  cpu: { label: "For the CPU", detail: "Works on any machine. The shipped model is made for it." },
  cuda: { label: "For an NVIDIA GPU (CUDA)", detail: "For large models. Needs an installed NVIDIA driver." },
};

export class Installer {
  private busy = false;

  constructor(
    private readonly folder: string,
    private readonly requirement: string,
    private readonly log: vscode.LogOutputChannel,
    private readonly messages: Messages,
  ) {}

  /** Ask how to install the server, and install it. Returns whether it is installed now. */
  async install(): Promise<boolean> {
    if (this.busy) {
      return false;
    }
    this.busy = true;
    try {
      const choice = await this.ask();
      return choice !== undefined && (await this.carryOut(choice));
    } finally {
      this.busy = false;
    }
  }

  private async ask(): Promise<Choice | undefined> {
    const tools = await findTools(process.env["PATH"] ?? "", process.platform, untrustedFolders(), childSurroundings());
    if (tools.length === 0) {
      this.messages.error(
        "The server needs uv, pipx, or Python 3.11 or newer with venv. None of them is on PATH; install one first.",
        ["log"],
      );
      return undefined;
    }
    const builds = buildsFor(process.platform).map((build) => ({
      ...BUILDS[build],
      description: `downloads ${downloadSize(build)}`,
      build,
    }));
    const build = await vscode.window.showQuickPick(builds, {
      title: "Install fimserver's server (1 of 3)",
      placeHolder: "Which hardware runs the model? Nothing is downloaded before the last step.",
    });
    if (build === undefined) {
      return undefined;
    }
    const programs = tools.map((found) => ({ label: found.tool, description: found.program, found }));
    const tool = await vscode.window.showQuickPick(programs, {
      title: "Install fimserver's server (2 of 3)",
      placeHolder: "Which tool installs it?",
    });
    if (tool === undefined) {
      return undefined;
    }
    const source = await this.askSource(downloadSize(build.build));
    if (source === undefined) {
      return undefined;
    }
    return { tool: tool.found.tool, program: tool.found.program, build: build.build, source };
  }

  private async askSource(size: string): Promise<string | undefined> {
    const detail = `Into ${this.folder}`;
    const published = { label: "$(cloud-download) Download and install", description: `${this.requirement}, ${size}` };
    const checkout = { label: "$(folder-opened) Install from a checkout...", description: `downloads ${size}` };
    const wheel = { label: "$(package) Install from a wheel file...", description: `downloads ${size}` };
    const items = [...(IS_PUBLISHED ? [published] : []), checkout, wheel].map((item) => ({ ...item, detail }));
    const picked = await vscode.window.showQuickPick(items, {
      title: "Install fimserver's server (3 of 3)",
      placeHolder: "Select the source. This starts the download.",
    });
    if (picked === undefined) {
      return undefined;
    }
    if (picked.label === published.label) {
      return this.requirement;
    }
    const isFolder = picked.label === checkout.label;
    const found = await vscode.window.showOpenDialog({
      canSelectFiles: !isFolder,
      canSelectFolders: isFolder,
      ...(isFolder ? {} : { filters: { Wheels: ["whl"] } }),
      title: isFolder ? "The folder of fimserver's checkout" : "fimserver's wheel",
      openLabel: "Install",
    });
    const path = found?.[0]?.fsPath;
    if (path !== undefined && isInside(path, untrustedFolders(), process.platform)) {
      this.messages.error(
        `${path} is in this workspace, which you do not trust. Trust it before you install from it.`,
        ["install"],
      );
      return undefined;
    }
    if (path !== undefined && isFolder && !(await isCheckout(path))) {
      this.messages.error(`${path} is not a checkout of fimserver: it has no pyproject.toml with that name.`, [
        "install",
      ]);
      return undefined;
    }
    return path;
  }

  private async carryOut(choice: Choice): Promise<boolean> {
    const options = { location: vscode.ProgressLocation.Notification, title: "fimserver", cancellable: true };
    try {
      await vscode.window.withProgress(options, async (progress, token) => {
        const abort = new AbortController();
        token.onCancellationRequested(() => abort.abort());
        await rm(this.folder, { recursive: true, force: true });
        const steps = toSteps(choice, this.folder, process.platform);
        for (const [number, step] of steps.entries()) {
          const title = `${step.title} (${number + 1} of ${steps.length})`;
          progress.report({ message: title });
          this.log.info(`${step.command} ${step.args.join(" ")}`);
          const onLine = (line: string): void => {
            this.log.info(line);
            progress.report({ message: `${title}: ${line.slice(0, 80)}` });
          };
          await run(step, childSurroundings(), onLine, abort.signal);
        }
        await access(programIn(this.folder, process.platform));
      });
      return true;
    } catch (error) {
      await rm(this.folder, { recursive: true, force: true });
      if (!(error instanceof CancelledError)) {
        const why = error instanceof Error ? error.message : String(error);
        this.messages.error(`The server could not be installed: ${why}`, ["install", "log"]);
      }
      return false;
    }
  }
}
