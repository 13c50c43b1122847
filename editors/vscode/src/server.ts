// Finds, starts, watches and restarts the server for this window, and keeps its state.

import * as vscode from "vscode";
import {
  CloseAction,
  DidChangeConfigurationNotification,
  ErrorAction,
  LanguageClient,
  type LanguageClientOptions,
  MessageType,
  RevealOutputChannelOn,
  ShowMessageNotification,
  ShowMessageRequest,
  State,
} from "vscode-languageclient/node";
import { Backoff } from "./backoff";
import { chosenSettings, ownSettings } from "./chosen";
import type { Explained } from "./explain";
import { toParts, toText } from "./headline";
import type { Messages } from "./messages";
import { Missed } from "./missed";
import { ServerProcess } from "./process";
import { findProgram, MissingProgramError, type Program } from "./program";
import { INITIAL, type Language, type Phase, type View } from "./view";
import { childSurroundings, workspaceFolders } from "./workspace";

/** Documents that are completed: files, new documents, and cells of notebooks. */
export const DOCUMENTS = [{ scheme: "file" }, { scheme: "untitled" }, { scheme: "vscode-notebook-cell" }];
const THINKING_AFTER_MS = 300;
const ANSWER_WITHIN_MS = 2_000;
const START_WITHIN_MS = 10_000;
const SETTLED_MS = 150;
const SNOOZE_LOOK_MS = 20_000;
const PHASES: Readonly<Record<string, Phase>> = {
  ready: "ready",
  stopped: "ready",
  loading: "loading",
  failed: "failed",
};

interface EngineStatus {
  readonly engine: {
    readonly state: string;
    readonly detail: string;
    readonly server?: string;
    readonly languages?: readonly string[];
  };
  readonly enabled: boolean;
  readonly snoozedMinutes: number;
  readonly trusted: boolean;
  readonly refusedModel: string | null;
  readonly refusedServer?: string | null;
  readonly refusedReason?: string | null;
  readonly language?: Language | null;
}

/** What the server needs to know about the window. */
export interface Window {
  /** Return the language of the active document, if completions are possible there. */
  language(): string | undefined;
  /** Return the user's own choice to have completions in this workspace; `undefined` leaves it to the settings. */
  isOnHere(): boolean | undefined;
}

/** A client without notifications of its own: `Server` reports each failure once, with its cause. */
class QuietClient extends LanguageClient {
  override error(message: string, data?: unknown): void {
    super.error(message, data, false);
  }
}

/** Notification of the server when its state changes, with the name that Copilot's server uses. */
interface DidChangeStatus {
  readonly kind: string;
  readonly busy: boolean;
  readonly message: string;
}

export class Server implements vscode.Disposable {
  view: View = INITIAL;
  program: Program | undefined;
  private client: LanguageClient | undefined;
  private process: ServerProcess | undefined;
  private hasRun = false; // since the user last requested a start
  private readonly backoff = new Backoff();
  private readonly missed = new Missed();
  private readonly changed = new vscode.EventEmitter<View>();
  private readonly subscriptions: vscode.Disposable[] = [this.changed];
  private restartTimer: NodeJS.Timeout | undefined;
  private refreshTimer: NodeJS.Timeout | undefined;
  private snoozeTimer: NodeJS.Timeout | undefined;
  private snoozedUntil = 0;
  private open = 0;
  private wishes = 0; // counts start and stop requests; only the latest one is carried out
  private told = 0; // counts state notifications of the server
  private stopping: Promise<void> = Promise.resolve();
  readonly onDidChange = this.changed.event;

  constructor(
    private readonly own: string,
    private readonly settings: readonly string[],
    private readonly log: vscode.LogOutputChannel,
    private readonly messages: Messages,
    private readonly window: Window,
  ) {
    this.subscriptions.push(
      vscode.workspace.onDidChangeConfiguration((event) => this.onConfiguration(event)),
      vscode.workspace.onDidGrantWorkspaceTrust(() => this.onTrust()),
    );
  }

  /** Find the server and start it. The user requested this, so earlier failures do not count. */
  async restart(): Promise<void> {
    this.backoff.reset();
    this.hasRun = false;
    this.messages.forget();
    const stopped = this.stop();
    const wish = this.wishes;
    await stopped;
    if (wish === this.wishes) {
      await this.start(); // else a later request starts it
    }
  }

  async start(): Promise<void> {
    clearTimeout(this.restartTimer);
    try {
      this.program = this.find();
    } catch (error) {
      if (!(error instanceof MissingProgramError)) {
        throw error;
      }
      this.fail(error.message, ["settings", "log"]);
      return;
    }
    if (this.program === undefined) {
      this.change({ phase: "missing" });
      return;
    }
    this.log.info(`starting ${this.program.path} (found by: ${this.program.origin})`);
    this.change({ ...INITIAL, phase: "starting" });
    const client = this.connect(this.program);
    this.client = client;
    try {
      await client.start();
    } catch (error) {
      await this.onEnded(client, error instanceof Error ? error.message : String(error));
      return;
    }
    if (this.client !== client) {
      return; // it has ended already, or was stopped: a start can succeed although the process is gone
    }
    this.hasRun = true;
    this.backoff.onStarted();
    const left = this.snoozedUntil - Date.now();
    if (left > 0) {
      await this.ask("fimserver/snooze", { minutes: left / 60_000 });
    }
    await this.refresh();
  }

  /** Stop the server. Resolves once every stopping server has ended: the editor keeps its registrations until then. */
  stop(): Promise<void> {
    this.wishes += 1;
    clearTimeout(this.restartTimer);
    const client = this.client;
    this.client = undefined;
    if (client?.needsStop()) {
      this.stopping = Promise.all([this.stopping, this.end(client)]).then(() => undefined);
    }
    return this.stopping;
  }

  private async end(client: LanguageClient): Promise<void> {
    try {
      if (client.state === State.Starting) {
        // A client cannot be stopped before it has started.
        await Promise.race([client.start(), new Promise((done) => setTimeout(done, START_WITHIN_MS))]);
      }
      await client.stop();
    } catch (error) {
      this.log.warn(`the server did not end in time: ${error instanceof Error ? error.message : error}`);
    }
    await this.process?.end(); // the next one is started only after this
  }

  /** Stop automatic completions for a number of minutes; 0 ends the snooze. */
  async snooze(minutes: number): Promise<void> {
    await this.ask("fimserver/snooze", { minutes });
    this.snoozedUntil = Date.now() + minutes * 60_000;
    await this.refresh();
  }

  /** Have the server ask again about the model or the server that the user has not allowed. */
  async askAgain(): Promise<void> {
    await this.ask("workspace/executeCommand", { command: "fimserver.restart", arguments: [] });
  }

  /** Ask why the last request of a document got its answer; `undefined` if the server does not respond. */
  explain(document: vscode.TextDocument | undefined): Promise<Explained | undefined> {
    return this.ask<Explained>(
      "fimserver/explain",
      document === undefined ? {} : { textDocument: { uri: document.uri.toString() } },
    );
  }

  /** Ask the server for its state. Returns whether it answered. */
  async refresh(): Promise<boolean> {
    const { client } = this;
    const languageId = this.window.language();
    const status = await this.ask<EngineStatus>("fimserver/status", languageId === undefined ? {} : { languageId });
    if (!status?.engine || this.client !== client) {
      return false;
    }
    const { engine, enabled, snoozedMinutes, trusted, refusedModel } = status;
    const { refusedServer = null, refusedReason = null, language = null } = status;
    const phase = PHASES[engine.state] ?? "ready";
    const where = {
      refusedServer,
      refusedReason,
      server: engine.server ?? "",
      learned: engine.languages ?? [],
      language,
    };
    this.change({
      enabled,
      snoozedMinutes,
      trusted,
      refusedModel,
      ...where,
      detail: engine.detail,
      phase,
      ...(engine.state === "ready" ? { engine: engine.detail } : {}),
    });
    clearTimeout(this.snoozeTimer);
    if (snoozedMinutes > 0) {
      this.snoozeTimer = setTimeout(() => void this.refresh(), SNOOZE_LOOK_MS);
    }
    return true;
  }

  private refreshSoon(): void {
    clearTimeout(this.refreshTimer);
    this.refreshTimer = setTimeout(() => void this.refresh(), SETTLED_MS);
  }

  dispose(): void {
    clearTimeout(this.refreshTimer);
    clearTimeout(this.snoozeTimer);
    for (const subscription of this.subscriptions) {
      subscription.dispose();
    }
    void this.stop();
  }

  private find(): Program | undefined {
    return findProgram({
      setting: vscode.workspace.getConfiguration("fimserver").get("serverPath", "").trim(),
      folders: workspaceFolders(),
      trusted: vscode.workspace.isTrusted,
      path: process.env["PATH"] ?? "",
      own: this.own,
      platform: process.platform,
    });
  }

  private connect(program: Program): LanguageClient {
    const run = async (): Promise<ServerProcess["child"]> => {
      this.process = undefined; // an earlier one's end does not explain why this one cannot start
      // Not in the open folder, so that the server cannot pick up files of that folder by accident.
      this.process = await ServerProcess.start(program.path, childSurroundings());
      return this.process.child;
    };
    const client: LanguageClient = new QuietClient(
      "fimserver",
      "fimserver",
      run,
      this.options(() => client),
    );
    client.onNotification("didChangeStatus", (status: DidChangeStatus) => this.onStatus(status));
    client.onNotification(ShowMessageNotification.type, ({ type, message }) => {
      if (type === MessageType.Error) {
        this.messages.error(message, ["restart", "doctor", "log"]);
      } else if (type === MessageType.Warning) {
        this.messages.warn(message, ["settings", "log"]);
      } else {
        this.messages.inform(message);
      }
    });
    client.onRequest(ShowMessageRequest.type, async ({ message, actions = [] }) => {
      const titles = actions.map((action) => action.title);
      const chosen = await vscode.window.showWarningMessage(toText(toParts(message)), ...titles);
      return actions.find((action) => action.title === chosen) ?? null;
    });
    return client;
  }

  private options(client: () => LanguageClient): LanguageClientOptions {
    return {
      documentSelector: DOCUMENTS,
      outputChannel: this.log,
      revealOutputChannelOn: RevealOutputChannelOn.Never,
      initializationOptions: () => ({ workspaceTrusted: vscode.workspace.isTrusted }),
      initializationFailedHandler: () => false, // start() fails with the same error and is handled there
      errorHandler: {
        error: () => ({ action: ErrorAction.Continue, handled: true }),
        closed: () => {
          void this.onEnded(client(), "the server ended");
          return { action: CloseAction.DoNotRestart, handled: true, message: "The server's connection was closed." };
        },
      },
      middleware: {
        didOpen: (document, next) => this.sendTo(client(), () => next(document)),
        didChange: (event, next) => this.sendTo(client(), () => next(event)),
        didClose: (document, next) => this.sendTo(client(), () => next(document)),
        provideInlineCompletionItems: async (document, position, context, token, next) => {
          const editor = vscode.window.activeTextEditor;
          if (editor?.document === document && editor.selections.length > 1) {
            return null; // a completion for one cursor is wrong at the others
          }
          const done = this.think();
          const { version } = document;
          try {
            const found = await next(document, position, this.missed.toContext(context), token);
            if (this.view.phase === "loading" && context.triggerKind === vscode.InlineCompletionTriggerKind.Automatic) {
              this.missed.note({ document, version, position }, found);
            }
            return found;
          } finally {
            done();
          }
        },
        workspace: {
          configuration: async (params, token, next) => {
            if (!params.items.every((item) => item.section === "fimserver")) {
              return next(params, token);
            }
            this.refreshSoon(); // after the server has applied them
            try {
              // Waited for, so that it precedes the answer and nothing is asked about the user's own settings.
              await client().sendNotification("fimserver/ownSettings", { settings: JSON.stringify(this.vouched()) });
            } catch (error) {
              this.log.debug(`fimserver/ownSettings: ${error instanceof Error ? error.message : error}`);
            }
            return params.items.map(() => this.chosen());
          },
        },
      },
    };
  }

  /** Send a document notification; ignore its failure if the server is being stopped. */
  private async sendTo(client: LanguageClient, send: () => Promise<void>): Promise<void> {
    try {
      await send();
    } catch (error) {
      if (client === this.client) {
        throw error;
      }
    }
  }

  /** Record that a request is running; call the returned function when it ends. */
  private think(): () => void {
    this.open += 1;
    const timer = setTimeout(() => this.change({ thinking: true }), THINKING_AFTER_MS);
    return () => {
      clearTimeout(timer);
      this.open -= 1;
      if (this.open === 0 && this.view.thinking) {
        this.change({ thinking: false });
      }
    };
  }

  private onStatus({ kind, busy, message }: DidChangeStatus): void {
    this.told += 1;
    if (kind === "Error") {
      this.change({ phase: "failed", detail: message });
    } else if (busy) {
      this.change({ phase: "loading", detail: message });
    } else {
      void this.onReady(message);
    }
  }

  /** Show the state ready, once the model's name is known. */
  private async onReady(message: string): Promise<void> {
    const { client, told } = this;
    const answered = await this.refresh();
    if (this.client !== client || this.told !== told) {
      return; // a newer state has arrived
    }
    if (!answered && client?.isRunning()) {
      this.change({ phase: "ready", detail: message });
    }
    if (this.view.phase === "ready") {
      await this.missed.askAgain();
    }
  }

  private async onEnded(client: LanguageClient, why: string): Promise<void> {
    if (this.client !== client) {
      return; // stopped on purpose, or handled already
    }
    this.client = undefined;
    const { wishes } = this;
    const cause = this.process === undefined ? why : await this.process.cause(); // or it could not be run at all
    if (this.wishes !== wishes || this.client !== undefined) {
      return; // another start or stop was requested meanwhile
    }
    if (cause !== undefined && !this.hasRun) {
      this.fail(`The server does not start: ${cause}. Its program is ${this.program?.path}.`, [
        "doctor",
        "install",
        "log",
      ]);
      return;
    }
    const pause = this.backoff.onEnded();
    if (pause === undefined) {
      this.fail(`The server ended several times: ${cause ?? why}.`, ["restart", "doctor", "log"]);
      return;
    }
    this.log.warn(`${cause ?? why}; restarting it in ${pause / 1_000} s`);
    this.change({ phase: "starting", thinking: false });
    this.restartTimer = setTimeout(() => void this.start(), pause);
  }

  private fail(detail: string, remedies: Parameters<Messages["error"]>[1]): void {
    this.change({ phase: "failed", detail });
    this.messages.error(detail, remedies);
  }

  private onConfiguration(event: vscode.ConfigurationChangeEvent): void {
    // This event also comes when trust is granted, which alone does not require a restart.
    if (event.affectsConfiguration("fimserver.serverPath") && (!this.client || this.isAnotherFound())) {
      void this.restart();
    } else if (event.affectsConfiguration("fimserver")) {
      void this.reconfigure();
    }
  }

  /** Handle granted trust: the workspace's own environment may be used now. */
  private onTrust(): void {
    if (this.client?.isRunning() && !this.isAnotherFound()) {
      void this.client
        .sendNotification("fimserver/didChangeWorkspaceTrust", { trusted: true })
        .then(() => this.refresh());
    } else {
      void this.restart();
    }
  }

  private isAnotherFound(): boolean {
    try {
      return this.find()?.path !== this.program?.path;
    } catch (error) {
      if (error instanceof MissingProgramError) {
        return true; // start() reports the error
      }
      throw error;
    }
  }

  /** Return the settings that this window sends; `null` for those that the user did not set. */
  chosen(): Record<string, unknown> {
    const chosen = chosenSettings(vscode.workspace.getConfiguration("fimserver"), this.settings);
    return { ...chosen, enabled: this.window.isOnHere() ?? chosen["enabled"] };
  }

  /** Return the settings that are the user's own: no file of the workspace has them. */
  vouched(): Record<string, unknown> {
    return ownSettings(vscode.workspace.getConfiguration("fimserver"), this.settings, vscode.env.remoteName);
  }

  /** Have the server read the settings again, the user's choice for this workspace included. */
  async reconfigure(): Promise<void> {
    if (this.client?.isRunning()) {
      // null makes the server request its settings.
      await this.client.sendNotification(DidChangeConfigurationNotification.type, { settings: null });
    }
  }

  private async ask<T>(method: string, params: object): Promise<T | undefined> {
    const client = this.client;
    if (!client?.isRunning()) {
      return undefined;
    }
    const token = new vscode.CancellationTokenSource();
    const timer = setTimeout(() => token.cancel(), ANSWER_WITHIN_MS);
    try {
      return await client.sendRequest<T>(method, params, token.token);
    } catch (error) {
      this.log.debug(`${method}: ${error instanceof Error ? error.message : error}`);
      return undefined;
    } finally {
      clearTimeout(timer);
      token.dispose();
    }
  }

  private change(what: Partial<View>): void {
    this.view = { ...this.view, ...what };
    this.changed.fire(this.view);
  }
}
