// The server's state as the user sees it: the status item's text and its menu.

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
  /** The engine's server to which nothing is sent, because the user has not allowed it. */
  readonly refusedServer: string | null;
  /** The server that gets the code; empty while it stays on this machine. */
  readonly server: string;
  readonly mode: string;
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
  refusedServer: null,
  server: "",
  mode: "auto",
};

/** Language of the active editor. */
export interface Language {
  readonly id: string;
  readonly enabled: boolean;
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

/** Return the content of the status item. */
export function toStatus(view: View, language: Language | undefined): Status {
  const lines = engineLine(view);
  const restricted = view.trusted ? [] : ["The workspace is not trusted: its model and device settings are ignored."];
  const refused =
    view.refusedModel === null ? [] : [`The model ${view.refusedModel} is not loaded: you have not allowed it.`];
  const notSent =
    view.refusedServer === null ? [] : [`Nothing is sent to ${view.refusedServer}: you have not allowed it.`];
  const base = { lines: [...lines, ...restricted, ...refused, ...notSent], severity: "none" as const };
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
  if (!view.enabled) {
    return { ...base, text: `$(circle-slash) ${NAME}`, headline: "Off" };
  }
  if (view.snoozedMinutes > 0) {
    const left = minutes(view.snoozedMinutes);
    return { ...base, text: `$(bell-slash) ${NAME} ${view.snoozedMinutes} min`, headline: `Snoozed for ${left}` };
  }
  if (language !== undefined && !language.enabled) {
    return { ...base, text: `$(circle-slash) ${NAME}`, headline: `Off for ${language.id}` };
  }
  if (view.thinking) {
    return { ...base, text: `$(sync~spin) ${NAME}`, headline: "Thinking" };
  }
  return { ...base, text: `$(${view.server === "" ? "sparkle" : "cloud"}) ${NAME}`, headline: "Ready" };
}

export type Action =
  | { readonly kind: "snooze"; readonly minutes: number }
  | { readonly kind: "language"; readonly id: string; readonly on: boolean }
  | { readonly kind: "enabled"; readonly on: boolean }
  | { readonly kind: "mode"; readonly mode: "auto" | "speculative" }
  | { readonly kind: "explain" | "stats" | "restart" | "log" | "doctor" | "settings" | "install" | "locate" };

export interface MenuItem {
  readonly label: string;
  readonly description?: string;
  readonly action?: Action; // a heading has none
}

const SNOOZES = [5, 15, 30, 60];

function ofServing(view: View, language: Language | undefined, hasWorkspace: boolean): MenuItem[] {
  const items: MenuItem[] = [];
  if (view.enabled && view.snoozedMinutes > 0) {
    items.push({
      label: "$(bell) End the snooze",
      description: `${minutes(view.snoozedMinutes)} left`,
      action: { kind: "snooze", minutes: 0 },
    });
  } else if (view.enabled) {
    for (const number of SNOOZES) {
      items.push({ label: `$(bell-slash) Snooze ${number} minutes`, action: { kind: "snooze", minutes: number } });
    }
  }
  const where = hasWorkspace ? "in this workspace" : "everywhere";
  items.push(
    view.enabled
      ? { label: `$(circle-slash) Turn off ${where}`, action: { kind: "enabled", on: false } }
      : { label: `$(check) Turn on ${where}`, action: { kind: "enabled", on: true } },
  );
  if (language !== undefined) {
    items.push(
      language.enabled
        ? {
            label: `$(circle-slash) Turn off for ${language.id}`,
            action: { kind: "language", id: language.id, on: false },
          }
        : { label: `$(check) Turn on for ${language.id}`, action: { kind: "language", id: language.id, on: true } },
    );
  }
  const isSpeculative = view.mode === "speculative" || view.mode === "verified";
  items.push({ label: "mode" });
  items.push({
    label: "$(rocket) Automatic mode",
    description: isSpeculative ? "the best mode for the model" : "the best mode for the model; in use",
    action: { kind: "mode", mode: "auto" },
  });
  items.push({
    label: "$(target) Speculative mode",
    description: isSpeculative ? "every token verified; in use" : "every token verified",
    action: { kind: "mode", mode: "speculative" },
  });
  items.push({ label: "insight" });
  items.push({ label: "$(question) Why was there no completion?", action: { kind: "explain" } });
  items.push({ label: "$(graph) Statistics", description: "counted on this machine only", action: { kind: "stats" } });
  return items;
}

/** Return the menu of the status item. */
export function toMenu(view: View, language: Language | undefined, hasWorkspace: boolean): MenuItem[] {
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
    ...(serves ? ofServing(view, language, hasWorkspace) : []),
    { label: "troubleshooting" },
    { label: "$(refresh) Restart the server", action: { kind: "restart" } },
    { label: "$(output) Open the log", action: { kind: "log" } },
    { label: "$(checklist) Doctor", description: "checks the installation", action: { kind: "doctor" } },
    { label: "$(gear) Settings", action: { kind: "settings" } },
  ];
}
