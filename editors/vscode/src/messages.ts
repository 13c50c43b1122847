// Messages with buttons for actions that fix the problem; each message is shown once until an action is chosen.

import * as vscode from "vscode";

export type Remedy = "restart" | "log" | "install" | "locate" | "doctor" | "settings";

const TITLES: Readonly<Record<Remedy, string>> = {
  restart: "Restart",
  log: "Open Log",
  install: "Install...",
  locate: "Locate...",
  doctor: "Doctor",
  settings: "Settings",
};
const COMMANDS: Readonly<Record<Remedy, string>> = {
  restart: "fimserver.restartServer",
  log: "fimserver.log",
  install: "fimserver.install",
  locate: "fimserver.locate",
  doctor: "fimserver.doctor",
  settings: "fimserver.settings",
};

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

  inform(text: string): void {
    this.show(text, [], vscode.window.showInformationMessage);
  }

  /** Allow earlier messages to be shown again, because the user has acted. */
  forget(): void {
    this.shown.clear();
  }

  private show(
    text: string,
    remedies: readonly Remedy[],
    how: (text: string, ...items: string[]) => Thenable<string | undefined>,
  ): void {
    if (this.shown.has(text)) {
      return;
    }
    this.shown.add(text);
    const shown = text.startsWith("fimserver") ? text : `fimserver: ${text}`;
    void how(shown, ...remedies.map((remedy) => TITLES[remedy])).then((title) => {
      const remedy = remedies.find((one) => TITLES[one] === title);
      if (remedy !== undefined) {
        this.shown.delete(text);
        void vscode.commands.executeCommand(COMMANDS[remedy]);
      }
    });
  }
}
