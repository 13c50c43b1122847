// Runs `fimserver doctor` in a terminal that stays open.

import { type ChildProcess, spawn } from "node:child_process";
import * as vscode from "vscode";
import { childSurroundings } from "./workspace";

class DoctorTerminal implements vscode.Pseudoterminal {
  private readonly written = new vscode.EventEmitter<string>();
  private readonly closed = new vscode.EventEmitter<number>();
  private child: ChildProcess | undefined;
  readonly onDidWrite = this.written.event;
  readonly onDidClose = this.closed.event;

  constructor(
    private readonly program: string,
    private readonly args: readonly string[],
  ) {}

  open(size: vscode.TerminalDimensions | undefined): void {
    const { cwd, env: inherited } = childSurroundings();
    const env = { ...inherited, FORCE_COLOR: "1", COLUMNS: String(size?.columns ?? 80) };
    const write = (text: string): void => this.written.fire(text.replace(/\r?\n/g, "\r\n"));
    write(`${this.program} ${this.args.join(" ")}\n\n`);
    const options = { cwd, env, windowsHide: true };
    const child = spawn(this.program, this.args, { ...options, stdio: ["ignore", "pipe", "pipe"] });
    child.stdout.setEncoding("utf8").on("data", write);
    child.stderr.setEncoding("utf8").on("data", write);
    child.on("error", (error) => write(`${error.message}\n`));
    child.on("close", () => write("\nPress any key to close this terminal.\n"));
    child.on("close", () => {
      this.child = undefined;
    });
    this.child = child;
  }

  handleInput(): void {
    if (this.child === undefined) {
      this.closed.fire(0);
    }
  }

  close(): void {
    this.child?.kill();
  }
}

/** Run `fimserver doctor` in a visible terminal, with the settings that this window sends to the server. */
export function runDoctor(program: string, settings: Readonly<Record<string, unknown>>): void {
  const chosen = Object.entries(settings).filter(([, value]) => value != null);
  const args = ["doctor", ...chosen.flatMap(([name, value]) => ["--set", `${name}=${JSON.stringify(value)}`])];
  const iconPath = new vscode.ThemeIcon("checklist");
  vscode.window.createTerminal({ name: "fimserver doctor", pty: new DoctorTerminal(program, args), iconPath }).show();
}
