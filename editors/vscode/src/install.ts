// Installs the server into the extension's own folder, only on the user's request.

import { type ChildProcess, spawn } from "node:child_process";
import { readFile } from "node:fs/promises";
import { dirname, join, win32 } from "node:path";
import type { Surroundings } from "./outside";
import { onPath, programIn } from "./program";

export type Tool = "uv" | "pipx" | "python";
export type Build = "cpu" | "cuda";

export interface Choice {
  readonly tool: Tool;
  readonly program: string;
  readonly build: Build;
  /** A requirement, or the path of a wheel or checkout. */
  readonly source: string;
}

export interface Step {
  readonly title: string;
  readonly command: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
}

/**
 * Whether the project owns the name `fimserver` on PyPI. Until then nothing is downloaded by that name, because anyone
 * could register it and run their code on users' machines. Turned on with the first release.
 */
export const IS_PUBLISHED: boolean = false;

const TORCH = "torch";
const CPU_INDEX = "https://download.pytorch.org/whl/cpu";
const CUDA_INDEX = "https://download.pytorch.org/whl/cu128"; // for Windows, where PyPI has no CUDA build
const OLDEST = "3.11";

/** Describe the download size, most of which is torch. */
export function downloadSize(build: Build): string {
  return build === "cpu" ? "about 0.3 GB" : "about 3 GB";
}

/** Return the builds that a platform has. */
export function buildsFor(platform: NodeJS.Platform): Build[] {
  return platform === "darwin" ? ["cpu"] : ["cpu", "cuda"];
}

/** Return whether the server can be installed from a folder. */
export async function isCheckout(folder: string): Promise<boolean> {
  try {
    return /^name = "fimserver"$/m.test(await readFile(join(folder, "pyproject.toml"), "utf8"));
  } catch {
    return false;
  }
}

function torchIndex(build: Build, platform: NodeJS.Platform): string | undefined {
  if (platform === "darwin") {
    return undefined; // macOS has one build
  }
  if (build === "cpu") {
    return CPU_INDEX;
  }
  return platform === "win32" ? CUDA_INDEX : undefined;
}

/** Return the commands that install the server into `folder`, in order. */
export function toSteps(choice: Choice, folder: string, platform: NodeJS.Platform): Step[] {
  const index = torchIndex(choice.build, platform);
  const python = programIn(folder, platform, "python");
  const fetchTorch = "downloading the runtime (torch)";
  const fetchServer = "installing the server";
  const make = "creating a virtual environment";
  if (choice.tool === "pipx") {
    const pip = index === undefined ? [] : [`--pip-args=--extra-index-url ${index}`];
    const programs = join(programIn(folder, platform), "..");
    return [
      {
        title: fetchServer,
        command: choice.program,
        args: ["install", ...pip, choice.source],
        env: { PIPX_HOME: join(folder, "pipx"), PIPX_BIN_DIR: programs },
      },
    ];
  }
  const from = index === undefined ? [] : ["--index-url", index];
  const isUv = choice.tool === "uv";
  const pip = isUv
    ? { command: choice.program, args: ["pip", "install", "--python", python] }
    : { command: python, args: ["-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"] };
  return [
    {
      title: make,
      command: choice.program,
      args: isUv ? ["venv", "--python", `>=${OLDEST}`, folder] : ["-I", "-m", "venv", folder],
    },
    { title: fetchTorch, command: pip.command, args: [...pip.args, ...from, TORCH] },
    { title: fetchServer, command: pip.command, args: [...pip.args, choice.source] },
  ];
}

/** Return this machine's tools that can install the server, best first; none from the `refused` folders. */
export async function findTools(
  path: string,
  platform: NodeJS.Platform,
  refused: readonly string[],
  around: Surroundings,
): Promise<{ tool: Tool; program: string }[]> {
  const found: { tool: Tool; program: string }[] = [];
  for (const tool of ["uv", "pipx"] as const) {
    const program = onPath(tool, path, platform, refused);
    if (program !== undefined) {
      found.push({ tool, program });
    }
  }
  for (const name of ["python3", "python"]) {
    const program = onPath(name, path, platform, refused);
    if (program !== undefined && (await isNewEnough(program, around))) {
      return [...found, { tool: "python", program }];
    }
  }
  return found;
}

async function isNewEnough(python: string, around: Surroundings): Promise<boolean> {
  const [major, minor] = OLDEST.split(".");
  const code = `import ensurepip, sys, venv; sys.exit(sys.version_info < (${major}, ${minor}))`;
  try {
    const step = { title: "", command: python, args: ["-I", "-c", code] };
    await run(step, around, () => {}, new AbortController().signal);
    return true;
  } catch {
    return false;
  }
}

export class CancelledError extends Error {}

/** Run one step and pass each printed line to `onLine`. Throws if it fails, `CancelledError` when aborted. */
export function run(
  step: Step,
  around: Surroundings,
  onLine: (line: string) => void,
  signal: AbortSignal,
): Promise<void> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) {
      reject(new CancelledError());
      return;
    }
    const isWindows = process.platform === "win32";
    const child = spawn(step.command, [...step.args], {
      cwd: around.cwd,
      env: { ...around.env, ...step.env },
      stdio: ["ignore", "pipe", "pipe"],
      detached: !isWindows, // a process group, so that its child processes end with it
      windowsHide: true,
    });
    let last = "";
    const read = (chunk: Buffer): void => {
      for (const line of chunk.toString().split(/[\r\n]+/)) {
        if (line.trim()) {
          last = line.trim();
          onLine(last);
        }
      }
    };
    child.stdout.on("data", read);
    child.stderr.on("data", read);
    const abort = (): void => end(child, isWindows);
    signal.addEventListener("abort", abort, { once: true });
    child.on("error", (error) => {
      signal.removeEventListener("abort", abort);
      reject(error);
    });
    child.on("close", (code) => {
      signal.removeEventListener("abort", abort);
      if (signal.aborted) {
        reject(new CancelledError());
      } else if (code === 0) {
        resolve();
      } else {
        reject(new Error(last || `${step.command} ended with code ${code}`));
      }
    });
  });
}

function end(child: ChildProcess, isWindows: boolean): void {
  if (child.pid === undefined) {
    return;
  }
  if (isWindows) {
    // By its name, Windows would look in the current folder first.
    const taskkill = win32.join(process.env["SystemRoot"] ?? "C:\\Windows", "System32", "taskkill.exe");
    const options = { cwd: dirname(taskkill), windowsHide: true };
    spawn(taskkill, ["/pid", String(child.pid), "/t", "/f"], options).on("error", () => child.kill());
    return;
  }
  try {
    process.kill(-child.pid, "SIGTERM");
  } catch {
    // the process has ended already
  }
}
