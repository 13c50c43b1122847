// Where the server's program is: the setting, the workspace's virtual environment, PATH, the extension's own.

import { accessSync, constants, statSync } from "node:fs";
import { homedir } from "node:os";
import { posix, win32 } from "node:path";

export type Origin = "setting" | "workspace" | "path" | "own";

export interface Program {
  readonly path: string;
  readonly origin: Origin;
}

/** The setting names a program that is not there; nothing else is started in its place. */
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

/** Where a virtual environment has its programs. */
export function programIn(environment: string, platform: NodeJS.Platform, name = "fimserver"): string {
  return platform === "win32"
    ? win32.join(environment, "Scripts", `${name}.exe`)
    : posix.join(environment, "bin", name);
}

function expand(setting: string, folders: readonly string[]): string {
  const home = setting.replace(/^~(?=$|[/\\])/, () => homedir());
  return home.replace(/\$\{workspaceFolder\}/g, () => folders[0] ?? "");
}

/** The first program on PATH with this name. */
export function onPath(
  name: string,
  path: string,
  platform: NodeJS.Platform,
  exists: (path: string) => boolean = isProgram,
): string | undefined {
  const { join, delimiter, isAbsolute } = platform === "win32" ? win32 : posix;
  const file = platform === "win32" ? `${name}.exe` : name;
  // A relative entry would find a program of the folder that happens to be open.
  const candidates = path.split(delimiter).filter((folder) => isAbsolute(folder));
  return candidates.map((folder) => join(folder, file)).find(exists);
}

/** The server's program; `undefined` where there is none yet. Throws `MissingProgramError`. */
export function findProgram(place: Place): Program | undefined {
  const exists = place.isProgram ?? isProgram;
  const { join, isAbsolute } = place.platform === "win32" ? win32 : posix;
  if (place.setting) {
    const path = expand(place.setting, place.trusted ? place.folders : []);
    if (!isAbsolute(path) || !exists(path)) {
      throw new MissingProgramError(
        `fimserver.serverPath is ${place.setting}, which is no program. Give the full path of fimserver, or clear it.`,
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
