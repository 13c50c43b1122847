// What the window's workspace means for starting programs.

import * as vscode from "vscode";
import { type Surroundings, surroundings } from "./outside";

/** Return the workspace's folders on this machine. */
export function workspaceFolders(): string[] {
  const folders = vscode.workspace.workspaceFolders ?? [];
  return folders.filter((folder) => folder.uri.scheme === "file").map((folder) => folder.uri.fsPath);
}

/** Return the folders from which nothing may be run. */
export function untrustedFolders(): string[] {
  return vscode.workspace.isTrusted ? [] : workspaceFolders();
}

/** Return the working folder and environment of child processes. */
export function childSurroundings(): Surroundings {
  return surroundings(workspaceFolders(), vscode.workspace.isTrusted);
}
