// Runs `fimserver setup` in a terminal: it recommends a model for this machine and downloads it after a yes.

import * as vscode from "vscode";
import { childSurroundings } from "./workspace";

/** Run the command in the terminal; resolves when it has ended, with whether it succeeded. */
export async function runSetup(program: string): Promise<boolean> {
  const { cwd, env } = childSurroundings();
  const variables = Object.fromEntries(Object.entries(env).filter((entry): entry is [string, string] => !!entry[1]));
  const execution = new vscode.ProcessExecution(program, ["setup"], { cwd, env: variables });
  const task = new vscode.Task({ type: "process" }, vscode.TaskScope.Workspace, "setup", "fimserver", execution);
  task.presentationOptions = { focus: true, clear: true };
  const ended = new Promise<boolean>((resolve) => {
    const subscription = vscode.tasks.onDidEndTaskProcess((event) => {
      if (event.execution.task.name === task.name && event.execution.task.source === task.source) {
        subscription.dispose();
        resolve(event.exitCode === 0);
      }
    });
  });
  await vscode.tasks.executeTask(task);
  return ended;
}
