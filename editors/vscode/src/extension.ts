// Connects commands, the status item and the server.

import { join } from "node:path";
import * as vscode from "vscode";
import { isLanguageOn, serverSettings } from "./chosen";
import { runDoctor } from "./doctor";
import { type Remedy, toSentence } from "./explain";
import { toParts, toText } from "./headline";
import { Installer } from "./installer";
import { Messages } from "./messages";
import { isInside } from "./outside";
import { openSample } from "./sample";
import { DOCUMENTS, Server } from "./server";
import { runSetup } from "./setup";
import { showStatistics } from "./statistics";
import { StatusItem } from "./statusItem";
import { type Scope, withLanguage, withoutLanguage } from "./switches";
import { type Action, isUnlearned, type Language, type MenuItem, namesOf, toMenu, toSnoozes, toStatus } from "./view";
import { untrustedFolders } from "./workspace";

const NOT_NOW = "fimserver.doNotOffer"; // keys of the extension's own storage
const ON_HERE = "fimserver.isOnHere";
const UNLEARNED_SHOWN = "fimserver.isUnlearnedShown";
const SETTLES_WITHIN_MS = 2_000;
const SETTLE_LOOK_MS = 100;
const REFRESH_WITHIN_MS = 200; // that the menu waits for the server
const REMEDIES: Readonly<Record<Remedy, { title: string; action: Action }>> = {
  endSnooze: { title: "End the Snooze", action: { kind: "snooze", minutes: 0 } },
  turnOn: { title: "Turn On", action: { kind: "turnOn" } },
  restart: { title: "Restart", action: { kind: "restart" } },
  settings: { title: "Settings", action: { kind: "settings" } },
  setup: { title: "Get a Model", action: { kind: "setup" } },
};

class Extension {
  private readonly log = vscode.window.createOutputChannel("fimserver", { log: true });
  private readonly messages = new Messages(this.log);
  private readonly status = new StatusItem();
  private readonly server: Server;
  private readonly installer: Installer;
  private readonly parts: string;
  private readonly id: string;

  constructor(private readonly context: vscode.ExtensionContext) {
    const own = join(context.globalStorageUri.fsPath, "server");
    this.parts = join(context.extensionPath, "dist");
    this.id = context.extension.id;
    const names = serverSettings(context.extension.packageJSON.contributes.configuration.properties);
    this.server = new Server(own, names, this.log, this.messages, {
      language: () => this.document()?.languageId,
      isOnHere: () => context.workspaceState.get<boolean>(ON_HERE),
    });
    this.installer = new Installer(own, this.parts, this.log, this.messages);
    this.server.onDidChange(() => this.show());
    context.subscriptions.push(
      this.log,
      this.status,
      this.server,
      vscode.window.onDidChangeActiveTextEditor(() => this.onDocument()),
      vscode.workspace.onDidOpenTextDocument(() => this.onDocument()), // also fired when a document's language changes
    );
    this.register("menu", () => this.showMenu());
    this.register("snoozeFor", () => this.carryOut({ kind: "snoozes" }));
    this.register("why", () => this.explain());
    this.register("toggle", () => this.carryOut({ kind: this.isOff() ? "turnOn" : "turnOff" }));
    for (const kind of ["stats", "log", "doctor", "settings", "install", "locate", "setup", "sample"] as const) {
      this.register(kind, () => this.carryOut({ kind }));
    }
    this.register("restartServer", () => this.carryOut({ kind: "restart" }));
  }

  /** Start the server, and offer to install it where there is none. Activation does not wait for this. */
  async start(): Promise<void> {
    this.show();
    try {
      await this.server.start();
      if (this.server.view.phase === "missing" && !this.context.globalState.get(NOT_NOW, false)) {
        await this.install();
      }
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error);
      this.messages.error(`The server could not be started. ${why}`, ["restart", "log"]);
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
    if (isUnlearned(view, this.language()) && !this.context.globalState.get(UNLEARNED_SHOWN, false)) {
      void this.context.globalState.update(UNLEARNED_SHOWN, true);
      this.messages.inform(
        `The model has learned ${namesOf(view.learned)} only. In other languages, only text that your files repeat is ` +
          "completed. A larger model, which is downloaded once, knows them.",
        ["setup", "close"],
      );
    }
  }

  /** Handle another active document, or another language of it. */
  private onDocument(): void {
    this.show();
    if (this.server.view.phase === "ready" && this.document()?.languageId !== this.server.view.language?.id) {
      void this.server.refresh();
    }
  }

  /** Return the active document; `undefined` if completions are not possible there. */
  private document(): vscode.TextDocument | undefined {
    const document = vscode.window.activeTextEditor?.document;
    return document === undefined || vscode.languages.match(DOCUMENTS, document) === 0 ? undefined : document;
  }

  /** Return the active document's language, as the server describes it once it does. */
  private language(): Language | undefined {
    const id = this.document()?.languageId;
    if (id === undefined) {
      return undefined;
    }
    const { language } = this.server.view;
    const enabled = isLanguageOn(this.settings().get("languages"), id);
    return language?.id === id ? language : { id, enabled, learned: true, onByDefault: true };
  }

  private settings(): vscode.WorkspaceConfiguration {
    return vscode.workspace.getConfiguration("fimserver");
  }

  private isOff(): boolean {
    return !this.server.view.enabled || this.language()?.enabled === false;
  }

  private async install(): Promise<void> {
    const answer = await this.installer.install();
    if (answer === "locate") {
      await this.locate();
    } else if (answer === "later") {
      await this.context.globalState.update(NOT_NOW, true); // the status item still offers it
    } else if (answer === "installed") {
      await this.server.restart();
      if (this.server.view.phase === "failed" && this.server.program?.path !== this.installer.program) {
        // Another program is found first, and does not run. The new setting starts the server again.
        await this.settings().update("serverPath", this.installer.program, vscode.ConfigurationTarget.Global);
      } else if (this.server.view.phase === "failed") {
        return; // reported already
      }
      this.messages.inform("Ready: type, and press Tab for the grey text. A sample shows it.", ["sample", "close"]);
    }
  }

  private async showMenu(): Promise<void> {
    await Promise.race([this.server.refresh(), new Promise((done) => setTimeout(done, REFRESH_WITHIN_MS))]);
    const { view } = this.server;
    const { headline, lines } = toStatus(view, this.language());
    const title = ["fimserver: ", [headline, ...lines].join(". ")].join("");
    await this.choose(toMenu(view, this.language()), title, "What would you like to do?");
  }

  private async choose(items: readonly MenuItem[], title: string, placeHolder: string): Promise<void> {
    const rows = items.map((item) => ({
      ...item,
      kind: item.action === undefined ? vscode.QuickPickItemKind.Separator : vscode.QuickPickItemKind.Default,
    }));
    const picked = await vscode.window.showQuickPick(rows, { title, placeHolder });
    if (picked?.action !== undefined) {
      await this.carryOut(picked.action);
    }
  }

  private async explain(): Promise<void> {
    const answer = await this.server.explain(vscode.window.activeTextEditor?.document);
    if (answer === undefined) {
      const { headline, lines } = toStatus(this.server.view, this.language());
      this.messages.inform([headline, ...lines].join(". "), ["log", "close"]);
      return;
    }
    const { text, remedy } = toSentence(answer);
    const fix = remedy === undefined ? undefined : REMEDIES[remedy];
    const titles = fix === undefined ? ["OK"] : [fix.title, "OK"];
    const chosen = await vscode.window.showInformationMessage(toText(toParts(text)), ...titles);
    if (fix !== undefined && chosen === fix.title) {
      await this.carryOut(fix.action);
    }
  }

  private async carryOut(action: Action): Promise<void> {
    switch (action.kind) {
      case "snooze":
        return this.server.snooze(action.minutes);
      case "snoozes":
        return this.choose(toSnoozes(this.server.view), "fimserver: Snooze", "No automatic completions for...");
      case "allow":
        return this.server.askAgain();
      case "turnOff":
        return this.turnOff();
      case "turnOn":
        return this.turnOn();
      case "explain":
        return this.explain();
      case "restart":
        return this.server.restart();
      case "log":
        this.log.show(true);
        return;
      case "settings":
        await vscode.commands.executeCommand("workbench.action.openSettings", `@ext:${this.id}`);
        return;
      case "install":
        return this.install();
      case "locate":
        return this.locate();
      case "sample":
        return this.server.view.phase === "missing" ? this.install() : openSample(this.parts);
      case "setup":
      case "stats":
      case "doctor":
        return this.runProgram(action.kind);
    }
  }

  /** Return the window's settings without those of the engine that need an agreement: a command asks for none. */
  private trusted(): Record<string, unknown> {
    const { restrictedConfigurations } = this.context.extension.packageJSON.capabilities.untrustedWorkspaces;
    const own = this.server.vouched();
    const chosen = Object.entries(this.server.chosen());
    return Object.fromEntries(
      chosen.filter(([name]) => name in own || !restrictedConfigurations.includes(`fimserver.${name}`)),
    );
  }

  /** Wait until the server has applied a change. Returns whether it is as expected, which it may never be. */
  private async settles(isSo: () => boolean): Promise<boolean> {
    const end = Date.now() + SETTLES_WITHIN_MS;
    while (Date.now() < end) {
      await this.server.refresh();
      if (isSo()) {
        return true;
      }
      await new Promise((done) => setTimeout(done, SETTLE_LOOK_MS));
    }
    return false;
  }

  /** Ask where to turn completions off. Only the user's own settings and storage change. */
  private async turnOff(): Promise<void> {
    const language = this.language();
    const items: (vscode.QuickPickItem & { scope: Scope })[] = [];
    if (language !== undefined) {
      items.push({ label: `For ${language.id}`, description: "in all workspaces", scope: "language" });
    }
    if (vscode.workspace.workspaceFolders !== undefined) {
      items.push({ label: "In this workspace", description: "for you; no file of it changes", scope: "workspace" });
    }
    items.push({ label: "Everywhere", description: "in your settings", scope: "everywhere" });
    const picked = await vscode.window.showQuickPick(items, { title: "fimserver: Turn Off" });
    if (picked?.scope === "language" && language !== undefined) {
      await this.writeLanguages(withoutLanguage(this.ownLanguages(), language.id));
      if (!(await this.settles(() => this.language()?.enabled !== true))) {
        this.messages.inform(`Still on for ${language.id}. The settings of this workspace turn it on.`, ["settings"]);
      }
    } else if (picked?.scope === "workspace") {
      await this.chooseHere(false);
    } else if (picked?.scope === "everywhere") {
      await this.settings().update("enabled", false, vscode.ConfigurationTarget.Global);
      await this.chooseHere(undefined);
      if (!(await this.settles(() => !this.server.view.enabled))) {
        await this.chooseHere(false); // the workspace's settings turn them on
      }
    }
  }

  /** Turn completions on where they are off; what turned them off is removed, or overruled where it is not the user's. */
  private async turnOn(): Promise<void> {
    if (!this.server.view.enabled) {
      if (this.settings().inspect("enabled")?.globalValue === false) {
        await this.settings().update("enabled", undefined, vscode.ConfigurationTarget.Global);
      }
      await this.chooseHere(undefined);
      if (!(await this.settles(() => this.server.view.enabled))) {
        await this.chooseHere(true); // the workspace's settings turn them off, or config.toml
      }
      return;
    }
    const language = this.language();
    if (language?.enabled !== false) {
      return;
    }
    const isOn = (): boolean => this.language()?.enabled === true;
    await this.writeLanguages(withLanguage(this.ownLanguages(), language.id, !language.onByDefault));
    if (await this.settles(isOn)) {
      return;
    }
    await this.writeLanguages(withLanguage(this.ownLanguages(), language.id, true)); // over config.toml, or another name
    if (!(await this.settles(isOn))) {
      this.messages.inform(`Still off for ${language.id}. The settings of this workspace turn it off.`, ["settings"]);
    }
  }

  private ownLanguages(): Record<string, boolean> | undefined {
    return this.settings().inspect<Record<string, boolean>>("languages")?.globalValue;
  }

  private async writeLanguages(table: Readonly<Record<string, boolean>> | undefined): Promise<void> {
    await this.settings().update("languages", table, vscode.ConfigurationTarget.Global);
  }

  /** Keep the user's choice for this workspace outside of its files. */
  private async chooseHere(isOn: boolean | undefined): Promise<void> {
    await this.context.workspaceState.update(ON_HERE, isOn);
    await this.server.reconfigure();
  }

  private async locate(): Promise<void> {
    const files = await vscode.window.showOpenDialog({ title: "Locate the fimserver program", openLabel: "Select" });
    if (files?.[0] !== undefined) {
      await this.settings().update("serverPath", files[0].fsPath, vscode.ConfigurationTarget.Global);
    }
  }

  private async runProgram(what: "stats" | "doctor" | "setup"): Promise<void> {
    const program = this.server.program?.path;
    if (program === undefined) {
      this.messages.warn("The server is not installed yet.", ["install", "locate"]);
    } else if (isInside(program, untrustedFolders(), process.platform)) {
      // Its folder was added to the workspace after the start.
      this.messages.warn(`The program is in a workspace that you do not trust. It is ${program}.`, ["restart"]);
    } else if (what === "doctor") {
      runDoctor(program, this.trusted());
    } else if (what === "setup") {
      if (await runSetup(program)) {
        await this.server.restart(); // with the settings that it wrote
        const chosen = this.server.chosen();
        if (chosen["model"] !== null || chosen["engine"] !== null) {
          this.messages.warn("VS Code's settings overrule the choice. Remove fimserver.model and fimserver.engine.", [
            "settings",
          ]);
        }
      }
    } else {
      try {
        await showStatistics(program);
      } catch (error) {
        const why = error instanceof Error ? error.message : String(error);
        this.messages.error(`The statistics could not be read. ${why}`, ["doctor", "log"]);
      }
    }
  }
}

let extension: Extension | undefined;

/** Register the commands and start. Waits neither for the user nor for the server: all commands work at once. */
export function activate(context: vscode.ExtensionContext): void {
  extension = new Extension(context);
  void extension.start();
}

export function deactivate(): Promise<void> | undefined {
  return extension?.stop();
}
