// Messages with buttons that fix the problem; each message is shown once until a button is clicked.

import * as vscode from "vscode";
import { toParts, toText } from "./headline";

export type Remedy = "restart" | "log" | "install" | "locate" | "doctor" | "settings" | "setup" | "sample" | "close";

/** Title and command of each button. A notification with a button is unfolded: without one, its text is cut. */
const BUTTONS: Readonly<Record<Remedy, { title: string; command?: string }>> = {
  restart: { title: "Restart", command: "fimserver.restartServer" },
  log: { title: "Open Log", command: "fimserver.log" },
  install: { title: "Install", command: "fimserver.install" },
  locate: { title: "Locate...", command: "fimserver.locate" },
  doctor: { title: "Doctor", command: "fimserver.doctor" },
  settings: { title: "Settings", command: "fimserver.settings" },
  setup: { title: "Get a Model", command: "fimserver.setup" },
  sample: { title: "Open a Sample", command: "fimserver.sample" },
  close: { title: "OK" },
};

type Show = (text: string, ...items: string[]) => Thenable<string | undefined>;

export class Messages {
  private readonly shown = new Set<string>();

  constructor(private readonly log: vscode.LogOutputChannel) {}

  error(text: string, remedies: readonly Remedy[]): void {
    this.log.error(text);
    this.show(text, remedies, vscode.window.showErrorMessage);
  }

  warn(text: string, remedies: readonly Remedy[]): void {
    this.log.warn(text);
    this.show(text, remedies, vscode.window.showWarningMessage);
  }

  inform(text: string, remedies: readonly Remedy[] = ["close"]): void {
    this.show(text, remedies, vscode.window.showInformationMessage);
  }

  /** Allow earlier messages to be shown again, because the user has acted. */
  forget(): void {
    this.shown.clear();
  }

  private show(text: string, remedies: readonly Remedy[], how: Show): void {
    if (this.shown.has(text)) {
      return;
    }
    this.shown.add(text);
    void how(toText(toParts(text)), ...remedies.map((remedy) => BUTTONS[remedy].title)).then((title) => {
      const button = remedies.map((remedy) => BUTTONS[remedy]).find((one) => one.title === title);
      if (button !== undefined) {
        this.shown.delete(text);
      }
      if (button?.command !== undefined) {
        void vscode.commands.executeCommand(button.command);
      }
    });
  }
}
