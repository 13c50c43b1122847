// Finds the server: by the setting, in the workspace's virtual environment, on PATH, in the extension's folder.

import { accessSync, constants, statSync } from "node:fs";
import { homedir } from "node:os";
import { posix, win32 } from "node:path";

export type Origin = "setting" | "workspace" | "path" | "own";

export interface Program {
  readonly path: string;
  readonly origin: Origin;
}

/** The setting names a program that does not exist; no other program is started instead. */
export class MissingProgramError extends Error {}

export interface Place {
  readonly setting: string;
  readonly folders: readonly string[];
  readonly trusted: boolean;
  readonly path: string;
  readonly own: string;
  readonly platform: NodeJS.Platform;
  readonly isProgram?: (path: string) => boolean;
}

export function isProgram(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch {
    return false;
  }
}

/** Return the path of a program in a virtual environment. */
export function programIn(environment: string, platform: NodeJS.Platform, name = "fimserver"): string {
  return platform === "win32"
    ? win32.join(environment, "Scripts", `${name}.exe`)
    : posix.join(environment, "bin", name);
}

function expand(setting: string, folders: readonly string[]): string {
  const home = setting.replace(/^~(?=$|[/\\])/, () => homedir());
  return home.replace(/\$\{workspaceFolder\}/g, () => folders[0] ?? "");
}

/** Return the first program on PATH with this name. */
export function onPath(
  name: string,
  path: string,
  platform: NodeJS.Platform,
  exists: (path: string) => boolean = isProgram,
): string | undefined {
  const { join, delimiter, isAbsolute } = platform === "win32" ? win32 : posix;
  const file = platform === "win32" ? `${name}.exe` : name;
  // A relative entry could find a program in the open folder, which may not be trusted.
  const candidates = path.split(delimiter).filter((folder) => isAbsolute(folder));
  return candidates.map((folder) => join(folder, file)).find(exists);
}

/** Return the server's program; `undefined` if none is installed. Throws `MissingProgramError`. */
export function findProgram(place: Place): Program | undefined {
  const exists = place.isProgram ?? isProgram;
  const { join, isAbsolute } = place.platform === "win32" ? win32 : posix;
  if (place.setting) {
    const path = expand(place.setting, place.trusted ? place.folders : []);
    if (!isAbsolute(path) || !exists(path)) {
      throw new MissingProgramError(
        `fimserver.serverPath is ${place.setting}, which is not a program. Set the full path of fimserver, or clear it.`,
      );
    }
    return { path, origin: "setting" };
  }
  if (place.trusted) {
    const environments = place.folders.flatMap((folder) => [".venv", "venv"].map((name) => join(folder, name)));
    const inside = environments.map((folder) => programIn(folder, place.platform)).find(exists);
    if (inside !== undefined) {
      return { path: inside, origin: "workspace" };
    }
  }
  const found = onPath("fimserver", place.path, place.platform, exists);
  if (found !== undefined) {
    return { path: found, origin: "path" };
  }
  const own = programIn(place.own, place.platform);
  return exists(own) ? { path: own, origin: "own" } : undefined;
}
