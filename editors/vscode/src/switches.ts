// Turns completions off and on: for a language, in this workspace, or everywhere. Nothing is written into the workspace.

import type { Inspected } from "./chosen";

export type Scope = "language" | "workspace" | "everywhere";
type Languages = Readonly<Record<string, boolean>>;

/** How to turn completions on: the user's setting to remove, and the choice for this workspace to keep. */
export interface On {
  readonly removesSetting: boolean;
  readonly here: boolean | undefined;
}

/** Return the changes that turn completions on again; a setting of the workspace is overruled, not changed. */
export function toOn(enabled: Inspected | undefined): On {
  const isOffInWorkspace = enabled?.workspaceValue === false || enabled?.workspaceFolderValue === false;
  return { removesSetting: enabled?.globalValue === false, here: isOffInWorkspace ? true : undefined };
}

/** Return the user's table of languages with a language off. */
export function withoutLanguage(own: Languages | undefined, id: string): Languages {
  return { ...own, [id]: false };
}

/**
 * Return the user's table with a language on again; `undefined` if nothing is left in it. The entry that turned it off
 * is removed; if it stays off without one (by "*", by the workspace or by default), an entry turns it on.
 */
export function withLanguage(own: Languages | undefined, id: string, staysOff: boolean): Languages | undefined {
  const { [id]: _removed, ...others } = own ?? {};
  const table = staysOff ? { ...others, [id]: true } : others;
  return Object.keys(table).length === 0 ? undefined : table;
}
