// Connects commands, the status item and the server.

import { join } from "node:path";
import * as vscode from "vscode";
import { isLanguageOn, serverSettings } from "./chosen";
import { runDoctor } from "./doctor";
import { type Remedy, toSentence } from "./explain";
import { Installer } from "./installer";
import { Messages } from "./messages";
import { isInside } from "./outside";
import { DOCUMENTS, Server } from "./server";
import { showStatistics } from "./statistics";
import { StatusItem } from "./statusItem";
import { type Action, type Language, toMenu, toStatus } from "./view";
import { untrustedFolders } from "./workspace";

const NOT_NOW = "fimserver.doNotOffer";
const REMEDIES: Readonly<Record<Remedy, { title: string; action: Action }>> = {
  endSnooze: { title: "End the Snooze", action: { kind: "snooze", minutes: 0 } },
  turnOn: { title: "Turn On", action: { kind: "enabled", on: true } },
  restart: { title: "Restart", action: { kind: "restart" } },
  settings: { title: "Settings", action: { kind: "settings" } },
};

class Extension {
  private readonly log = vscode.window.createOutputChannel("fimserver", { log: true });
  private readonly messages = new Messages(this.log);
  private readonly status = new StatusItem();
  private readonly server: Server;
  private readonly installer: Installer;

  constructor(private readonly context: vscode.ExtensionContext) {
    const own = join(context.globalStorageUri.fsPath, "server");
    const { version, contributes } = context.extension.packageJSON;
    const names = serverSettings(contributes.configuration.properties);
    this.server = new Server(own, names, this.log, this.messages);
    this.installer = new Installer(own, `fimserver==${version}`, this.log, this.messages);
    this.server.onDidChange(() => this.show());
    context.subscriptions.push(
      this.log,
      this.status,
      this.server,
      vscode.window.onDidChangeActiveTextEditor(() => this.show()),
      vscode.workspace.onDidOpenTextDocument(() => this.show()), // also fired when a document's language changes
    );
    this.register("menu", () => this.showMenu());
    this.register("snoozeFor", () => this.showSnoozes());
    this.register("why", () => this.explain());
    this.register("toggle", () => this.carryOut({ kind: "enabled", on: !this.server.view.enabled }));
    this.register("toggleLanguage", () => this.toggleLanguage());
    for (const kind of ["stats", "log", "doctor", "settings", "install", "locate"] as const) {
      this.register(kind, () => this.carryOut({ kind }));
    }
    this.register("restartServer", () => this.carryOut({ kind: "restart" }));
  }

  async start(): Promise<void> {
    this.show();
    await this.server.start();
    if (this.server.view.phase === "missing" && !this.context.globalState.get(NOT_NOW, false)) {
      await this.offer();
    }
  }

  stop(): Promise<void> {
    return this.server.stop();
  }

  private register(name: string, what: () => unknown): void {
    this.context.subscriptions.push(vscode.commands.registerCommand(`fimserver.${name}`, what));
  }

  private show(): void {
    const { view } = this.server;
    this.status.show(view, this.language());
    void vscode.commands.executeCommand("setContext", "fimserver.serving", view.phase === "ready");
  }

  /** Return the active document's language; `undefined` if completions are not possible there. */
  private language(): Language | undefined {
    const document = vscode.window.activeTextEditor?.document;
    if (document === undefined || vscode.languages.match(DOCUMENTS, document) === 0) {
      return undefined;
    }
    const languages = this.settings().get("languages");
    return { id: document.languageId, enabled: isLanguageOn(languages, document.languageId) };
  }

  private settings(): vscode.WorkspaceConfiguration {
    return vscode.workspace.getConfiguration("fimserver");
  }

  private async offer(): Promise<void> {
    const [install, locate, notNow] = ["Install...", "Locate...", "Not Now"];
    const text = "fimserver: the completion server is not installed on this machine yet.";
    const answer = await vscode.window.showInformationMessage(text, install, locate, notNow);
    if (answer === install) {
      await this.carryOut({ kind: "install" });
    } else if (answer === locate) {
      await this.carryOut({ kind: "locate" });
    } else {
      await this.context.globalState.update(NOT_NOW, true); // the status item still offers it
    }
  }

  private async showMenu(): Promise<void> {
    await this.server.refresh();
    const { view } = this.server;
    const hasWorkspace = vscode.workspace.workspaceFolders !== undefined;
    const items = toMenu(view, this.language(), hasWorkspace).map((item) => ({
      ...item,
      kind: item.action === undefined ? vscode.QuickPickItemKind.Separator : vscode.QuickPickItemKind.Default,
    }));
    const { headline, lines } = toStatus(view, this.language());
    const title = ["fimserver: ", [headline, ...lines].join(". ")].join("");
    const picked = await vscode.window.showQuickPick(items, { title, placeHolder: "What would you like to do?" });
    if (picked?.action !== undefined) {
      await this.carryOut(picked.action);
    }
  }

  private async showSnoozes(): Promise<void> {
    const { view } = this.server;
    const items = toMenu(view, undefined, false).filter((item) => item.action?.kind === "snooze");
    const picked = await vscode.window.showQuickPick(items, { title: "fimserver: no automatic completions for" });
    if (picked?.action !== undefined) {
      await this.carryOut(picked.action);
    }
  }

  private async toggleLanguage(): Promise<void> {
    const language = this.language();
    if (language !== undefined) {
      await this.carryOut({ kind: "language", id: language.id, on: !language.enabled });
    }
  }

  private async explain(): Promise<void> {
    const answer = await this.server.explain(vscode.window.activeTextEditor?.document);
    if (answer === undefined) {
      const { headline, lines } = toStatus(this.server.view, this.language());
      void vscode.window.showInformationMessage(`fimserver: ${[headline, ...lines].join(". ")}`);
      return;
    }
    const { text, remedy } = toSentence(answer);
    const fix = remedy === undefined ? undefined : REMEDIES[remedy];
    const titles = fix === undefined ? [] : [fix.title];
    const chosen = await vscode.window.showInformationMessage(`fimserver: ${text}`, ...titles);
    if (fix !== undefined && chosen === fix.title) {
      await this.carryOut(fix.action);
    }
  }

  private async carryOut(action: Action): Promise<void> {
    switch (action.kind) {
      case "snooze":
        return this.server.snooze(action.minutes);
      case "language": {
        const languages = this.settings().inspect<Record<string, boolean>>("languages")?.globalValue ?? {};
        await this.update("languages", { ...languages, [action.id]: action.on });
        return;
      }
      case "enabled": {
        const inWorkspace = vscode.workspace.workspaceFolders !== undefined;
        const target = inWorkspace ? vscode.ConfigurationTarget.Workspace : vscode.ConfigurationTarget.Global;
        await this.settings().update("enabled", action.on, target);
        return;
      }
      case "mode":
        await this.update("mode", action.mode);
        return;
      case "explain":
        return this.explain();
      case "restart":
        return this.server.restart();
      case "log":
        this.log.show(true);
        return;
      case "settings":
        await vscode.commands.executeCommand("workbench.action.openSettings", "fimserver");
        return;
      case "install":
        if (await this.installer.install()) {
          await this.server.restart();
        }
        return;
      case "locate":
        return this.locate();
      case "stats":
      case "doctor":
        return this.runProgram(action.kind);
    }
  }

  /** Change a setting in the workspace if it is set there, else globally. */
  private async update(name: string, value: unknown): Promise<void> {
    const inWorkspace = this.settings().inspect(name)?.workspaceValue !== undefined;
    const target = inWorkspace ? vscode.ConfigurationTarget.Workspace : vscode.ConfigurationTarget.Global;
    await this.settings().update(name, value, target);
  }

  private async locate(): Promise<void> {
    const files = await vscode.window.showOpenDialog({ title: "Locate the fimserver program", openLabel: "Select" });
    if (files?.[0] !== undefined) {
      await this.settings().update("serverPath", files[0].fsPath, vscode.ConfigurationTarget.Global);
    }
  }

  private async runProgram(what: "stats" | "doctor"): Promise<void> {
    const program = this.server.program?.path;
    if (program === undefined) {
      this.messages.warn("The server is not installed yet.", ["install", "locate"]);
    } else if (isInside(program, untrustedFolders(), process.platform)) {
      // Its folder was added to the workspace after the start.
      this.messages.warn(`${program} is in this workspace, which you do not trust.`, ["restart"]);
    } else if (what === "doctor") {
      runDoctor(program);
    } else {
      try {
        await showStatistics(program);
      } catch (error) {
        const why = error instanceof Error ? error.message : String(error);
        this.messages.error(`The statistics could not be read: ${why}`, ["doctor", "log"]);
      }
    }
  }
}

let extension: Extension | undefined;

export async function activate(context: vscode.ExtensionContext): Promise<void> {
  extension = new Extension(context);
  await extension.start();
}

export function deactivate(): Promise<void> | undefined {
  return extension?.stop();
}
