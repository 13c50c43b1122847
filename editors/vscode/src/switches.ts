// Turns completions off and on: for a language, in this workspace, or everywhere. Nothing is written into the workspace.

export type Scope = "language" | "workspace" | "everywhere";
type Languages = Readonly<Record<string, boolean>>;

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
