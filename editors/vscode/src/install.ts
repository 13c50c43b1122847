// Installs the server into the extension's own folder, only on the user's request.

import { type ChildProcess, spawn } from "node:child_process";
import { dirname, win32 } from "node:path";
import type { Surroundings } from "./outside";
import { onPath, programIn } from "./program";

export type Tool = "uv" | "python";
export type Build = "cpu" | "cuda";

/** A program that can install the server. */
export interface Installing {
  readonly tool: Tool;
  readonly program: string;
}

export interface Choice extends Installing {
  readonly build: Build;
  /** The server's wheel, which travels in the extension's package. */
  readonly wheel: string;
  /** Package index for torch; empty for PyTorch's own. */
  readonly index: string;
}

export interface Step {
  readonly title: string;
  readonly command: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
}

/** The release of torch that this version of the extension was tested with; README.md names the same. */
export const TORCH = "torch==2.13.0";
const CPU_INDEX = "https://download.pytorch.org/whl/cpu";
const CUDA_INDEX = "https://download.pytorch.org/whl/cu128"; // for Windows, where PyPI has no CUDA build
const OLDEST = "3.11";

/** Describe the download size, most of which is torch. */
export function downloadSize(build: Build): string {
  return build === "cpu" ? "0.3 GB" : "3 GB";
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
  const index = choice.index || torchIndex(choice.build, platform);
  const python = programIn(folder, platform, "python");
  const from = index === undefined ? [] : ["--index-url", index];
  const isUv = choice.tool === "uv";
  const pip = isUv
    ? { command: choice.program, args: ["pip", "install", "--python", python] }
    : { command: python, args: ["-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"] };
  return [
    {
      title: "Preparing Python",
      command: choice.program,
      args: isUv ? ["venv", "--python", `>=${OLDEST}`, folder] : ["-I", "-m", "venv", folder],
    },
    { title: "Downloading torch", command: pip.command, args: [...pip.args, ...from, TORCH] },
    { title: "Installing the server", command: pip.command, args: [...pip.args, choice.wheel] },
  ];
}

/** Return the program that installs the server, uv before Python; none from the `refused` folders. */
export async function findTool(
  path: string,
  platform: NodeJS.Platform,
  refused: readonly string[],
  around: Surroundings,
): Promise<Installing | undefined> {
  const uv = onPath("uv", path, platform, refused);
  if (uv !== undefined) {
    return { tool: "uv", program: uv };
  }
  for (const name of ["python3", "python"]) {
    const program = onPath(name, path, platform, refused);
    if (program !== undefined && (await isNewEnough(program, around))) {
      return { tool: "python", program };
    }
  }
  return undefined;
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

/** Return what is being done, from a line of pip or uv: "torch, 184.3 MB" is downloaded, "unpacking 60 packages". */
export function toDoing(line: string): string | undefined {
  const packages = /^Installing collected packages: (.*)/.exec(line)?.[1];
  if (packages !== undefined) {
    return `unpacking ${packages.split(",").length} packages`;
  }
  const found = /^\s*Downloading (\S+) \(([\d.]+) ?([kKMG])i?B\)/.exec(line);
  if (found === null) {
    return undefined;
  }
  const [, file = "", number = "", unit = ""] = found;
  const name = /([^/]+?)(?:-\d[^/]*)?$/.exec(file)?.[1] ?? file;
  return `${name}, ${number} ${unit}B`;
}

const NETWORK: readonly [RegExp, string][] = [
  [/407 Proxy|Proxy Authentication Required|Cannot connect to proxy/i, "The proxy refused the connection."],
  [
    /CERTIFICATE_VERIFY_FAILED|invalid peer certificate|UnknownIssuer|self.signed/i,
    "The server's certificate is not trusted.",
  ],
  [
    /Name or service not known|name resolution|getaddrinfo|dns error|Could not resolve|nodename nor servname/i,
    "The network does not find the server.",
  ],
  [
    /Connection refused|Network is unreachable|No route to host|ConnectTimeout|timed out|operation timed out|Max retries/i,
    "The server cannot be reached.",
  ],
  [/\b(?:403|401) (?:Forbidden|Unauthorized|Client Error)/i, "The server refuses the download."],
];

/**
 * Return in words why an installation failed: what is wrong with the network, or the last error that was printed.
 * `args` are the command's, which may name the package index.
 */
export function explainFailure(lines: readonly string[], args: readonly string[] = []): string {
  for (const [pattern, words] of NETWORK) {
    const printed = lines.filter((one) => pattern.test(one));
    if (printed.length > 0) {
      const url = args[args.indexOf("--index-url") + 1] ?? "";
      const host = /host=['"]([\w.-]+)/.exec(printed.join(" "))?.[1] ?? /https?:\/\/([\w.-]+)/.exec(url)?.[1];
      const named = host === undefined ? words : words.replace(/the server(?!')/i, host);
      return `${named} Check the connection and the proxy; the log has all that was printed.`;
    }
  }
  if (lines.some((line) => /No space left on device|os error 28|not enough space/i.test(line))) {
    return "The disk is full.";
  }
  const error = lines.findLast((line) => /^\s*(?:error|ERROR)\b/.test(line)) ?? lines.at(-1);
  return error?.trim().replace(/^(?:error|ERROR): ?/, "") ?? "";
}

export class CancelledError extends Error {}

const KEPT_LINES = 200;

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
    const lines: string[] = [];
    const read = (chunk: Buffer): void => {
      for (const line of chunk.toString().split(/[\r\n]+/)) {
        if (line.trim()) {
          lines.push(line.trim());
          lines.splice(0, lines.length - KEPT_LINES);
          onLine(line.trim());
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
        reject(new Error(explainFailure(lines, step.args) || `${step.command} ended with code ${code}`));
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
