// Finds the server: by the setting, in the workspace's virtual environment, on PATH, in the extension's folder.

import { accessSync, constants, statSync } from "node:fs";
import { homedir } from "node:os";
import { posix, win32 } from "node:path";
import { isFull, isInside, safeEntries } from "./outside";

export type Origin = "setting" | "workspace" | "path" | "own";

export interface Program {
  readonly path: string;
  readonly origin: Origin;
}

/** The setting names a program that does not exist or must not run; no other program is started instead. */
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

/** Return the first program on PATH with this name. Relative entries and the `refused` folders do not count. */
export function onPath(
  name: string,
  path: string,
  platform: NodeJS.Platform,
  refused: readonly string[],
  exists: (path: string) => boolean = isProgram,
): string | undefined {
  const { join } = platform === "win32" ? win32 : posix;
  const file = platform === "win32" ? `${name}.exe` : name;
  const candidates = safeEntries(path, refused, platform).map((folder) => join(folder, file));
  return candidates.find((candidate) => exists(candidate) && !isInside(candidate, refused, platform));
}

/** Return the server's program; `undefined` if none is installed. Throws `MissingProgramError`. */
export function findProgram(place: Place): Program | undefined {
  const exists = place.isProgram ?? isProgram;
  const { join } = place.platform === "win32" ? win32 : posix;
  const refused = place.trusted ? [] : place.folders;
  if (place.setting) {
    const path = expand(place.setting, place.trusted ? place.folders : []);
    if (!isFull(path, place.platform) || !exists(path)) {
      throw new MissingProgramError(
        `fimserver.serverPath is ${place.setting}, which is not a program. Set the full path of fimserver, or clear it.`,
      );
    }
    if (isInside(path, refused, place.platform)) {
      throw new MissingProgramError(
        `fimserver.serverPath is ${place.setting}, which is in this workspace. Trust the workspace, or set another path.`,
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
  const found = onPath("fimserver", place.path, place.platform, refused, exists);
  if (found !== undefined) {
    return { path: found, origin: "path" };
  }
  const own = programIn(place.own, place.platform);
  return exists(own) ? { path: own, origin: "own" } : undefined;
}
