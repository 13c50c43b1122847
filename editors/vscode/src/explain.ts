// Explains in a sentence why there was or was no completion, and which action would change that.

export interface Explained {
  readonly last: {
    readonly outcome: string;
    readonly source?: string;
    readonly reason?: string;
    readonly detail?: string;
    readonly timings_ms?: { readonly total?: number };
  } | null;
  readonly engine: { readonly state: string; readonly detail: string };
}

const SOURCES: Readonly<Record<string, string>> = {
  model: "the model wrote it",
  first_line: "its first line was ready; the next request adds the rest",
  match: "the same text is elsewhere in your files",
  cache: "it continues an earlier completion",
};

export type Remedy = "endSnooze" | "turnOn" | "restart" | "settings";

export interface Sentence {
  readonly text: string;
  readonly remedy?: Remedy;
}

const REMEDIES: Readonly<Record<string, Remedy>> = {
  snoozed: "endSnooze",
  disabled: "turnOn",
  engine: "restart",
  language_off: "settings",
  low_confidence: "settings",
};

/** Turn the server's answer to `fimserver/explain` into a sentence for the user. */
export function toSentence({ last, engine }: Explained): Sentence {
  if (last === null) {
    return { text: `There was no request in this file yet. Model: ${engine.detail} (${engine.state}).` };
  }
  if (last.outcome === "offered") {
    const total = last.timings_ms?.total;
    const time = total === undefined ? "" : ` after ${Math.round(total)} ms`;
    const source = SOURCES[last.source ?? ""];
    return { text: `The last request was answered with a completion${time}${source ? `: ${source}` : ""}.` };
  }
  const remedy = REMEDIES[last.reason ?? ""];
  const text = `Nothing was offered: ${last.detail ?? last.reason ?? "the server gave no reason"}.`;
  return remedy === undefined ? { text } : { text, remedy };
}
