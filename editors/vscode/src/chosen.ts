// Selects the settings to send to the server: those that the user set. The editor's defaults would hide config.toml.

export interface Inspected {
  readonly globalValue?: unknown;
  readonly workspaceValue?: unknown;
  readonly workspaceFolderValue?: unknown;
}

export interface Configuration {
  get(name: string): unknown;
  inspect(name: string): Inspected | undefined;
}

/** Settings of the extension, which the server does not know. */
export const OWN: readonly string[] = ["serverPath", "torchIndex", "trace.server"];

/** Return a value for each of the server's settings; `null` (not set) for those that the user did not set. */
export function chosenSettings(configuration: Configuration, names: readonly string[]): Record<string, unknown> {
  const values: Record<string, unknown> = {};
  for (const name of names) {
    const found = configuration.inspect(name);
    const chosen = found && [found.globalValue, found.workspaceValue, found.workspaceFolderValue];
    values[name] = chosen?.some((value) => value !== undefined) ? (configuration.get(name) ?? null) : null;
  }
  return values;
}

/** Return the names of the settings that the user's own value decides, and no file of the workspace. */
export function ownSettings(configuration: Configuration, names: readonly string[]): string[] {
  return names.filter((name) => {
    const found = configuration.inspect(name);
    const isOthers = found?.workspaceValue !== undefined || found?.workspaceFolderValue !== undefined;
    return found?.globalValue !== undefined && !isOthers;
  });
}

/** Return the names of the server's settings, from the properties in package.json. */
export function serverSettings(properties: Readonly<Record<string, unknown>>): string[] {
  const names = Object.keys(properties).map((name) => name.replace(/^fimserver\./, ""));
  return names.filter((name) => !OWN.includes(name));
}

/** Return whether the setting `fimserver.languages` turns a language on. */
export function isLanguageOn(languages: unknown, id: string): boolean {
  const table = (typeof languages === "object" && languages !== null ? languages : {}) as Record<string, unknown>;
  return (table[id] ?? table["*"] ?? true) !== false;
}
