// Opens a sample with the cursor where a completion is wanted, so that the first ghost text is one click away.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as vscode from "vscode";

const BEGUN = "self.items.ap"; // the line to complete

/** Open a new document with the sample, and request a completion in it. Nothing is written to the disk. */
export async function openSample(parts: string): Promise<void> {
  const content = await readFile(join(parts, "sample.txt"), "utf8");
  const document = await vscode.workspace.openTextDocument({ language: "python", content });
  const editor = await vscode.window.showTextDocument(document);
  const place = document.positionAt(content.indexOf(BEGUN) + BEGUN.length);
  editor.selection = new vscode.Selection(place, place);
  editor.revealRange(new vscode.Range(place, place), vscode.TextEditorRevealType.InCenter);
  await vscode.commands.executeCommand("editor.action.inlineSuggest.trigger");
}
