// Shows the server's statistics page in a tab, without scripts.

import { execFile } from "node:child_process";
import * as vscode from "vscode";
import { toThemed } from "./themed";
import { childSurroundings } from "./workspace";

const MAX_PAGE_BYTES = 16 * 1024 * 1024;

function readPage(program: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const options = { ...childSurroundings(), maxBuffer: MAX_PAGE_BYTES, timeout: 30_000 };
    execFile(program, ["stats", "--html", "--write", "-"], options, (error, page, complaint) => {
      if (error) {
        reject(new Error(complaint.trim().split("\n").at(-1) || error.message));
      } else {
        resolve(page);
      }
    });
  });
}

/** Open a new statistics page. Throws if the server's program does not write it. */
export async function showStatistics(program: string): Promise<void> {
  const page = await readPage(program);
  const options = { enableScripts: false, localResourceRoots: [] };
  const panel = vscode.window.createWebviewPanel(
    "fimserver.statistics",
    "fimserver: Statistics",
    vscode.ViewColumn.Active,
    options,
  );
  panel.webview.html = toThemed(page);
}
