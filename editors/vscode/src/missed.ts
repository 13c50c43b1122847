// Keeps a request that got no completion while the model was loading, and repeats it once the model is loaded.

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

  /** Record a request made while the model was loading, and its answer. */
  note(asked: Asked, answer: Answer): void {
    const items = Array.isArray(answer) ? answer : (answer?.items ?? []);
    this.what = items.length > 0 ? undefined : asked;
  }

  /** Make the editor repeat the request if document and cursor have not changed since. */
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

  /** Mark a repeated request as automatic: the editor can only repeat it as invoked. Invoked requests stay invoked. */
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
