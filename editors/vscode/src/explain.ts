// Explains why there was or was no completion, and which action would change that.

import { capitalized, toParts } from "./headline";

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
  model: "The model wrote it.",
  first_line: "Its first line was ready; the next request adds the rest.",
  match: "The same text is elsewhere in your files.",
  cache: "It continues an earlier completion.",
};

export type Remedy = "endSnooze" | "turnOn" | "restart" | "settings" | "setup";

export interface Sentence {
  readonly text: string;
  readonly remedy?: Remedy;
}

/** The server's reasons for offering nothing, in a few words each; tests/lsp/test_reasons.py compares the names. */
export const HEADLINES: Readonly<Record<string, string>> = {
  analysis: "Reading this file failed",
  analysis_crashed: "Reading this file crashed",
  analysis_refused: "This file failed too often",
  analysis_slow: "Reading this file took too long",
  before_code: "Code follows the cursor",
  before_mark: "The cursor is before the byte order mark",
  before_word: "The cursor is directly before a word",
  cancelled: "The editor cancelled the request",
  deleted: "You have just deleted that text",
  disabled: "Completions are off",
  empty: "The model has nothing to add",
  engine: "The model does not answer",
  error: "An error in fimserver",
  file_error: "This file cannot be read",
  file_slow: "The disk does not answer",
  generated_file: "This file is generated",
  huge_file: "This file is too large",
  ignored_file: "This file is ignored",
  in_comment: "Comments are off",
  in_docstring: "Docstrings are off",
  in_string: "Strings are off",
  inside_quotes: "The cursor is inside quotes",
  language_not_learned: "The model has not learned this language",
  language_off: "Completions are off in this language",
  late: "The model was too slow",
  loading: "The model is still loading",
  long_line: "This line is too long",
  long_path: "The path of this file is too long",
  low_confidence: "The model was too unsure",
  match_changed: "Text from elsewhere does not fit here",
  no_consent: "The model is not allowed here",
  plain_text: "This file is read as plain text",
  private_file: "Files with secrets are never read",
  read_only: "This file is read-only",
  repeats_suffix: "The answer already follows the cursor",
  repetition: "The model repeats itself",
  snoozed: "Snoozed",
  stale: "The text changed meanwhile",
  superseded: "A newer request replaced it",
  unsettled: "The model had not settled on an answer",
  syntax: "The answer would have broken the code",
  too_many_files: "Too many files are open",
  contradicts_name: "The answer contradicts a name in this file",
  repeats_comment: "The answer repeats a comment",
  repeats_line: "The answer repeats the line above",
  unreachable: "The answer would never be reached",
  word_start: "A word begins here",
  unfinished: "The answer was not finished",
};

const REMEDIES: Readonly<Record<string, Remedy>> = {
  snoozed: "endSnooze",
  disabled: "turnOn",
  engine: "restart",
  in_comment: "settings",
  in_docstring: "settings",
  in_string: "settings",
  language_not_learned: "setup",
  language_off: "turnOn",
  low_confidence: "settings",
  no_consent: "settings",
  word_start: "settings",
};

/** Turn the server's answer to `fimserver/explain` into a text for the user, the decisive words first. */
export function toSentence({ last, engine }: Explained): Sentence {
  if (last === null) {
    return { text: `No request in this file yet. Model: ${engine.detail} (${engine.state}).` };
  }
  if (last.outcome === "offered") {
    const total = last.timings_ms?.total;
    const time = total === undefined ? "" : ` after ${Math.round(total)} ms`;
    return { text: `There was a completion${time}. ${SOURCES[last.source ?? ""] ?? ""}`.trim() };
  }
  const detail = last.detail ?? "The server gave no reason";
  const headline = HEADLINES[last.reason ?? ""] ?? toParts(detail).headline;
  const text = `${headline}. ${capitalized(detail)}.`;
  const remedy = REMEDIES[last.reason ?? ""];
  return remedy === undefined ? { text } : { text, remedy };
}
