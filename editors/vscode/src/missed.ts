// What got no answer while the model was loading, to be asked again once it is there.

import * as vscode from "vscode";

type Answer = vscode.InlineCompletionItem[] | vscode.InlineCompletionList | null | undefined;

interface Asked {
  readonly document: vscode.TextDocument;
  readonly version: number;
  readonly position: vscode.Position;
}

export class Missed {
  private what: Asked | undefined;
  private asks = false;

  /** A request of that time, and its answer. */
  note(asked: Asked, answer: Answer): void {
    const items = Array.isArray(answer) ? answer : (answer?.items ?? []);
    this.what = items.length > 0 ? undefined : asked;
  }

  /** Have the editor ask once more, where the person has stayed since. */
  async askAgain(): Promise<void> {
    const { what } = this;
    this.what = undefined;
    const editor = vscode.window.activeTextEditor;
    if (what === undefined || editor?.document !== what.document || what.document.version !== what.version) {
      return;
    }
    if (editor.selection.isEmpty && editor.selection.active.isEqual(what.position)) {
      this.asks = true;
      try {
        await vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
      } finally {
        this.asks = false;
      }
    }
  }

  /** The editor can ask again only as if a key had been pressed for it; nobody did. Who asks by hand is answered so. */
  toContext(context: vscode.InlineCompletionContext): vscode.InlineCompletionContext {
    if (this.asks) {
      this.asks = false;
      return { ...context, triggerKind: vscode.InlineCompletionTriggerKind.Automatic };
    }
    if (context.triggerKind === vscode.InlineCompletionTriggerKind.Invoke) {
      this.what = undefined;
    }
    return context;
  }
}
