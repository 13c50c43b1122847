// The server's process: starts it, remembers why it ended, and kills it if it does not end when it should.

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import type { Surroundings } from "./outside";

const END_WITHIN_MS = 2_000;
const TOLD_WITHIN_MS = 500; // the connection closes before the process has ended
const MOST_CHARACTERS = 4_000;

export class ServerProcess {
  private text = "";
  private readonly ended: Promise<unknown>;

  private constructor(readonly child: ChildProcess) {
    this.ended = new Promise((done) => child.once("close", done).once("error", done));
    child.stderr?.on("data", (chunk: Buffer) => {
      this.text = (this.text + chunk.toString()).slice(-MOST_CHARACTERS);
    });
  }

  /** Start the program as a server on its standard streams. Rejects if it cannot be run. */
  static async start(program: string, around: Surroundings): Promise<ServerProcess> {
    const child = spawn(program, ["lsp"], { ...around, stdio: ["pipe", "pipe", "pipe"], windowsHide: true });
    const process = new ServerProcess(child);
    await once(child, "spawn");
    return process;
  }

  /** Return the last line that a failed process wrote to its standard error; `undefined` if it did not fail. */
  async cause(): Promise<string | undefined> {
    await Promise.race([this.ended, new Promise((done) => setTimeout(done, TOLD_WITHIN_MS))]);
    const { exitCode, signalCode } = this.child;
    if (signalCode !== null) {
      return `ended by ${signalCode}`;
    }
    return exitCode === null || exitCode === 0 ? undefined : lastLine(this.text) || `exit code ${exitCode}`;
  }

  /** End the process if it has not ended soon. */
  async end(): Promise<void> {
    const timer = setTimeout(() => this.child.kill("SIGKILL"), END_WITHIN_MS);
    await this.ended;
    clearTimeout(timer);
  }
}

/** Return the last line with text, without the name of a Python exception. */
export function lastLine(text: string): string {
  const last = text
    .split(/\r?\n/)
    .map((line) => line.trim())
    .filter((line) => line !== "")
    .at(-1);
  return (last ?? "").replace(/^[A-Z]\w*(?:Error|Exception): /, "");
}
