// Which settings are sent to the server: those that somebody chose. The editor's defaults would hide config.toml.

export interface Inspected {
  readonly globalValue?: unknown;
  readonly workspaceValue?: unknown;
  readonly workspaceFolderValue?: unknown;
}

export interface Configuration {
  get(name: string): unknown;
  inspect(name: string): Inspected | undefined;
}

/** The extension's own, which the server does not know. */
export const OWN: readonly string[] = ["serverPath", "trace.server"];

/** A value for each of the server's settings; `null`, which says nothing, for those that nobody chose. */
export function chosenSettings(configuration: Configuration, names: readonly string[]): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const name of names) {
    const found = configuration.inspect(name);
    const said = found && [found.globalValue, found.workspaceValue, found.workspaceFolderValue];
    values[name] = said?.some((value) => value !== undefined) ? (configuration.get(name) ?? null) : null;
  }
  return values;
}

/** The names of the server's settings, as package.json has them. */
export function serverSettings(properties: Readonly<Record<string, unknown>>): string[] {
  const names = Object.keys(properties).map((name) => name.replace(/^fimserver\./, ""));
  return names.filter((name) => !OWN.includes(name));
}

/** Whether a language is on, by the setting `fimserver.languages`. */
export function isLanguageOn(languages: unknown, id: string): boolean {
  const table = (typeof languages === "object" && languages !== null ? languages : {}) as Record<string, unknown>;
  return (table[id] ?? table["*"] ?? true) !== false;
}
