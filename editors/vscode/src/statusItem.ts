// The status item.

import * as vscode from "vscode";
import { type Language, toStatus, type View } from "./view";

const BACKGROUNDS = {
  none: undefined,
  warning: new vscode.ThemeColor("statusBarItem.warningBackground"),
  error: new vscode.ThemeColor("statusBarItem.errorBackground"),
};

export class StatusItem implements vscode.Disposable {
  private readonly item = vscode.window.createStatusBarItem("fimserver.status", vscode.StatusBarAlignment.Right, 100);

  constructor() {
    this.item.name = "fimserver";
    this.item.command = "fimserver.menu";
  }

  show(view: View, language: Language | undefined): void {
    const { text, headline, lines, severity } = toStatus(view, language);
    const tooltip = new vscode.MarkdownString("**fimserver**: ");
    tooltip.appendText(headline);
    for (const line of lines) {
      tooltip.appendMarkdown("\n\n").appendText(line);
    }
    this.item.text = text;
    this.item.tooltip = tooltip;
    this.item.backgroundColor = BACKGROUNDS[severity];
    this.item.accessibilityInformation = { label: ["fimserver", headline, ...lines].join(", "), role: "button" };
    this.item.show();
  }

  dispose(): void {
    this.item.dispose();
  }
}
