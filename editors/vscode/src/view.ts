// The server's state as the user sees it: the status item's text and its menu.

import { capitalized } from "./headline";

export type Phase = "missing" | "starting" | "loading" | "ready" | "failed" | "stopped";

/** State of the server. */
export interface View {
  readonly phase: Phase;
  /** After a failure, the error and its fix; else the engine's own description. */
  readonly detail: string;
  /** For instance "tiny on cpu"; empty before the model is loaded. */
  readonly engine: string;
  readonly enabled: boolean;
  readonly snoozedMinutes: number;
  readonly thinking: boolean;
  readonly trusted: boolean;
  readonly refusedModel: string | null;
  /** Why the model is not in use: `not_allowed`, or `not_found`. */
  readonly refusedReason: string | null;
  /** The engine's server to which nothing is sent, because the user has not allowed it. */
  readonly refusedServer: string | null;
  /** The server that gets the code; empty while it stays on this machine. */
  readonly server: string;
  /** Languages that the model was trained on; empty for any. */
  readonly learned: readonly string[];
  /** What the server reports about the active document's language; `null` before it does. */
  readonly language: Language | null;
}

export const INITIAL: View = {
  phase: "starting",
  detail: "",
  engine: "",
  enabled: true,
  snoozedMinutes: 0,
  thinking: false,
  trusted: true,
  refusedModel: null,
  refusedReason: null,
  refusedServer: null,
  server: "",
  learned: [],
  language: null,
};

/** Language of the active editor. */
export interface Language {
  readonly id: string;
  readonly enabled: boolean;
  /** Whether the model was trained on it. */
  readonly learned: boolean;
  /** Whether completions are on without an entry in the settings. */
  readonly onByDefault: boolean;
}

export interface Status {
  readonly text: string;
  readonly headline: string;
  readonly lines: readonly string[];
  readonly severity: "none" | "warning" | "error";
}

const NAME = "fimserver";

function minutes(number: number): string {
  return number === 1 ? "1 minute" : `${number} minutes`;
}

function engineLine(view: View): string[] {
  if (view.server !== "") {
    return [`Engine: ${view.engine}`, `Code is sent to ${view.server}`];
  }
  const [, model, device] = /^(.+) on (\S+)$/.exec(view.engine) ?? [];
  if (model === undefined || device === undefined) {
    return view.engine === "" ? [] : [`Engine: ${view.engine}`];
  }
  return [`Model: ${model}, on ${device}`];
}

/** Name the languages that the model was trained on. */
export function namesOf(learned: readonly string[]): string {
  const few = learned.slice(0, 2).map(capitalized).join(", ");
  return learned.length > 2 ? `${few}, ...` : few;
}

/** Return whether the model was not trained on a language that is completed. */
export function isUnlearned(view: View, language: Language | undefined): boolean {
  return view.phase === "ready" && view.enabled && language?.enabled === true && !language.learned;
}

/** Return the content of the status item. */
export function toStatus(view: View, language: Language | undefined): Status {
  const lines = engineLine(view);
  const restricted = view.trusted ? [] : ["The workspace is not trusted: its model and device settings are ignored."];
  const base = { lines: [...lines, ...restricted], severity: "none" as const };
  switch (view.phase) {
    case "missing":
      return {
        text: `$(cloud-download) ${NAME}`,
        headline: "The server is not installed",
        lines: ["Click to install or locate it."],
        severity: "warning",
      };
    case "failed":
      return { text: `$(error) ${NAME}`, headline: "No completions", lines: [view.detail], severity: "error" };
    case "stopped":
      return { text: `$(circle-slash) ${NAME}`, headline: "The server is stopped", lines: [], severity: "none" };
    case "starting":
      return { ...base, text: `$(loading~spin) ${NAME}`, headline: "The server is starting" };
    case "loading":
      return { ...base, text: `$(loading~spin) ${NAME}`, headline: "The model is loading" };
    default:
  }
  if (view.refusedModel !== null) {
    const lines = [`The model ${view.refusedModel} is not loaded.`, ...base.lines];
    return view.refusedReason === "not_found"
      ? { text: `$(warning) ${NAME}`, headline: "Model not found", lines, severity: "warning" }
      : waiting("Model not allowed", lines);
  }
  if (view.refusedServer !== null) {
    return waiting("Server not allowed", [`Nothing is sent to ${view.refusedServer}.`, ...base.lines]);
  }
  if (!view.enabled) {
    return { ...base, text: `$(circle-slash) ${NAME}`, headline: "Off" };
  }
  if (view.snoozedMinutes > 0) {
    const left = minutes(view.snoozedMinutes);
    return { ...base, text: `$(bell-slash) ${NAME} ${view.snoozedMinutes} min`, headline: `Snoozed for ${left}` };
  }
  if (language !== undefined && !language.enabled) {
    const off = language.onByDefault ? `Off for ${language.id}` : `On request for ${language.id}`;
    return { ...base, text: `$(circle-slash) ${NAME}`, headline: off };
  }
  if (view.thinking) {
    return { ...base, text: `$(sync~spin) ${NAME}`, headline: "Thinking" };
  }
  const icon = view.server === "" ? "sparkle" : "cloud";
  if (language !== undefined && isUnlearned(view, language)) {
    const only = `${namesOf(view.learned)} only`;
    const line = `The model has not learned ${language.id}: only text that your files repeat is completed.`;
    return { ...base, text: `$(${icon}) ${NAME}: ${only}`, headline: only, lines: [line, ...base.lines] };
  }
  return { ...base, text: `$(${icon}) ${NAME}`, headline: "Ready" };
}

function waiting(headline: string, lines: readonly string[]): Status {
  return {
    text: `$(warning) ${NAME}`,
    headline,
    lines: [...lines, "Click to allow or refuse it."],
    severity: "warning",
  };
}

export type Action =
  | { readonly kind: "snooze"; readonly minutes: number }
  | { readonly kind: "turnOff" | "turnOn" | "snoozes" | "setup" | "sample" | "allow" }
  | { readonly kind: "explain" | "stats" | "restart" | "log" | "doctor" | "settings" | "install" | "locate" };

export interface MenuItem {
  readonly label: string;
  readonly description?: string;
  readonly action?: Action; // a heading has none
}

const SNOOZES = [5, 15, 30, 60];

/** Return the choices of the snooze list. */
export function toSnoozes(view: View): MenuItem[] {
  const end: MenuItem = { label: "$(bell) End the snooze", action: { kind: "snooze", minutes: 0 } };
  const items = SNOOZES.map(
    (number): MenuItem => ({ label: minutes(number), action: { kind: "snooze", minutes: number } }),
  );
  return view.snoozedMinutes > 0 ? [end, ...items] : items;
}

function ofServing(view: View, language: Language | undefined): MenuItem[] {
  const items: MenuItem[] = [];
  const refused = view.refusedModel ?? view.refusedServer;
  if (view.refusedReason === "not_found") {
    items.push({ label: "$(warning) Change the model", description: refused ?? "", action: { kind: "settings" } });
  } else if (refused !== null) {
    items.push({ label: "$(warning) Allow or refuse", description: refused, action: { kind: "allow" } });
  }
  if (language !== undefined && isUnlearned(view, language)) {
    const description = `the model has learned ${namesOf(view.learned)} only`;
    items.push({ label: `$(mortar-board) Get a model for ${language.id}`, description, action: { kind: "setup" } });
  }
  const isOff = !view.enabled || language?.enabled === false;
  if (view.enabled) {
    items.push(
      view.snoozedMinutes > 0
        ? {
            label: "$(bell) End the snooze",
            description: `${minutes(view.snoozedMinutes)} left`,
            action: { kind: "snooze", minutes: 0 },
          }
        : { label: "$(bell-slash) Snooze...", action: { kind: "snoozes" } },
    );
  }
  const on = view.enabled && language !== undefined ? `Turn on for ${language.id}` : "Turn on";
  items.push(
    isOff
      ? { label: `$(check) ${on}`, action: { kind: "turnOn" } }
      : { label: "$(circle-slash) Turn off...", action: { kind: "turnOff" } },
  );
  items.push({ label: "$(question) Why was there no completion?", action: { kind: "explain" } });
  items.push({ label: "$(graph) Statistics", description: "counted on this machine only", action: { kind: "stats" } });
  return items;
}

/** Return the menu of the status item. */
export function toMenu(view: View, language: Language | undefined): MenuItem[] {
  if (view.phase === "missing") {
    return [
      {
        label: "$(cloud-download) Install the server",
        description: "shows the download size first",
        action: { kind: "install" },
      },
      {
        label: "$(folder-opened) Locate the server",
        description: "fimserver.serverPath",
        action: { kind: "locate" },
      },
      { label: "$(refresh) Search again", action: { kind: "restart" } },
      { label: "$(output) Open the log", action: { kind: "log" } },
    ];
  }
  const serves = view.phase === "ready" || view.phase === "loading";
  return [
    ...(serves ? ofServing(view, language) : []),
    { label: "troubleshooting" },
    { label: "$(refresh) Restart the server", action: { kind: "restart" } },
    { label: "$(output) Open the log", action: { kind: "log" } },
    { label: "$(checklist) Doctor", description: "checks the installation", action: { kind: "doctor" } },
    { label: "$(gear) Settings", action: { kind: "settings" } },
  ];
}
