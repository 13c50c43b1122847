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

const MADE_BY_REPOSITORY = ["dev-container", "codespaces"]; // there, a file of the repository sets machine settings

/**
 * Return the settings whose value is the user's own, and not one of a file of the workspace. `remote` is the kind of
 * machine that the window is connected to, if it is another.
 */
export function ownSettings(
  configuration: Configuration,
  names: readonly string[],
  remote: string | undefined,
): Record<string, unknown> {
  if (remote !== undefined && MADE_BY_REPOSITORY.includes(remote)) {
    return {};
  }
  const own = names.filter((name) => {
    const found = configuration.inspect(name);
    const isOthers = found?.workspaceValue !== undefined || found?.workspaceFolderValue !== undefined;
    return found?.globalValue !== undefined && !isOthers;
  });
  return Object.fromEntries(own.map((name) => [name, configuration.get(name) ?? null]));
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
