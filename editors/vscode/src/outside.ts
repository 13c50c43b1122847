// Keeps the files of a workspace from being run by accident: where a path leads, and where and with what programs run.

import { readlinkSync, realpathSync, statSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, parse, posix, win32 } from "node:path";

/** What a child process gets from its parent. */
export interface Surroundings {
  readonly cwd: string;
  readonly env: NodeJS.ProcessEnv;
}

const MOST_STEPS = 1_000; // links may form a circle
const SEARCH_PATHS = ["PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX"]; // uv looks in the last two

/** Return whether a path means the same file whatever the current folder and drive are. */
export function isFull(path: string, platform: NodeJS.Platform): boolean {
  return platform === "win32" ? /^([a-z]:[\\/]|[\\/]{2})/i.test(path) : posix.isAbsolute(path);
}

function resolved(path: string): string {
  try {
    return realpathSync.native(path);
  } catch {
    return path;
  }
}

/** Return the path, and every path that is passed on the way to its file: a link on the way decides what runs. */
function wayTo(path: string, platform: NodeJS.Platform): string[] {
  const { sep, join, dirname, parse, normalize } = platform === "win32" ? win32 : posix;
  const split = (text: string): string[] => text.split(platform === "win32" ? /[\\/]/ : sep);
  const way = [normalize(path), resolved(path)];
  let place = parse(path).root;
  const left = split(path.slice(place.length));
  for (let step = 0; left.length > 0 && step < MOST_STEPS; step += 1) {
    const name = left.shift() ?? "";
    if (name === "" || name === ".") {
      continue;
    }
    if (name === "..") {
      place = dirname(place);
      continue;
    }
    const next = join(place, name);
    way.push(next);
    try {
      const target = readlinkSync(next);
      const { root } = parse(target);
      left.unshift(...split(target.slice(root.length)));
      place = root || place;
    } catch {
      place = next; // not a link
    }
  }
  return way;
}

/** Return whether a path is one of the folders, or is in one of them, directly or through a link. */
export function isInside(path: string, folders: readonly string[], platform: NodeJS.Platform): boolean {
  const { relative, isAbsolute, sep } = platform === "win32" ? win32 : posix;
  const fold = (text: string): string => (platform === "linux" ? text : text.toLowerCase());
  const roots = folders.flatMap((folder) => [folder, resolved(folder)]).map(fold);
  return wayTo(path, platform)
    .map(fold)
    .some((step) =>
      roots.some((root) => {
        const rest = relative(root, step);
        return rest !== ".." && !rest.startsWith(`..${sep}`) && !isAbsolute(rest);
      }),
    );
}

/** Return the folders of a search path that are full paths outside the given folders. */
export function safeEntries(path: string, folders: readonly string[], platform: NodeJS.Platform): string[] {
  const { delimiter } = platform === "win32" ? win32 : posix;
  return path.split(delimiter).filter((entry) => isFull(entry, platform) && !isInside(entry, folders, platform));
}

function isFolder(path: string): boolean {
  try {
    return statSync(path).isDirectory();
  } catch {
    return false;
  }
}

/**
 * Return what child processes get: a working folder outside the workspace, and an environment whose search paths
 * have no relative entries and, without trust, none in the workspace.
 */
export function surroundings(
  folders: readonly string[],
  trusted: boolean,
  environment: NodeJS.ProcessEnv = process.env,
  platform: NodeJS.Platform = process.platform,
  home: string = homedir(),
): Surroundings {
  const { delimiter } = platform === "win32" ? win32 : posix;
  const refused = trusted ? [] : folders;
  const env = { ...environment };
  for (const [name, value] of Object.entries(env)) {
    // Windows has "Path".
    if (SEARCH_PATHS.includes(platform === "win32" ? name.toUpperCase() : name) && value !== undefined) {
      const entries = safeEntries(value, refused, platform);
      if (entries.length > 0) {
        env[name] = entries.join(delimiter);
      } else {
        delete env[name]; // an empty entry means the current folder
      }
    }
  }
  if (platform === "win32") {
    env["NoDefaultCurrentDirectoryInExePath"] = "1"; // programs that look for others by name skip their own folder
  }
  const editor = dirname(process.execPath); // if the home folder is the workspace
  const places = [home, editor].filter((place) => isFolder(place) && !isInside(place, folders, platform));
  return { cwd: places[0] ?? parse(editor).root, env };
}
