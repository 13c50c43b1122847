import { homedir } from "node:os";
import { expect, test } from "vitest";
import { findProgram, MissingProgramError, onPath, type Place } from "../src/program";

function place(programs: string[], more: Partial<Place> = {}): Place {
  return {
    setting: "",
    folders: ["/one", "/two"],
    trusted: true,
    path: "/usr/bin:/opt/bin",
    own: "/storage/server",
    platform: "linux",
    isProgram: (path) => programs.includes(path),
    ...more,
  };
}

const ALL = ["/set/fimserver", "/two/venv/bin/fimserver", "/opt/bin/fimserver", "/storage/server/bin/fimserver"];

test("the setting comes first", () => {
  expect(findProgram(place(ALL, { setting: "/set/fimserver" }))).toEqual({ path: ALL[0], origin: "setting" });
});

test("then the environment of a workspace folder, PATH, and the extension's own", () => {
  expect(findProgram(place(ALL))).toEqual({ path: ALL[1], origin: "workspace" });
  expect(findProgram(place(ALL.slice(2)))).toEqual({ path: ALL[2], origin: "path" });
  expect(findProgram(place(ALL.slice(3)))).toEqual({ path: ALL[3], origin: "own" });
  expect(findProgram(place([]))).toBeUndefined();
});

test(".venv comes before venv, the first folder before the second", () => {
  const programs = ["/two/.venv/bin/fimserver", "/one/venv/bin/fimserver", "/one/.venv/bin/fimserver"];
  expect(findProgram(place(programs))?.path).toBe("/one/.venv/bin/fimserver");
});

test("nothing of a workspace that is not trusted is started", () => {
  expect(findProgram(place(ALL, { trusted: false }))?.origin).toBe("path");
  const setting = `\${workspaceFolder}/.venv/bin/fimserver`;
  const programs = ["/one/.venv/bin/fimserver"];
  expect(findProgram(place(programs, { setting }))?.path).toBe(programs[0]);
  expect(() => findProgram(place(programs, { setting, trusted: false }))).toThrow(MissingProgramError);
});

test("a setting with a missing program is an error, and no other program is started", () => {
  expect(() => findProgram(place(ALL, { setting: "/gone/fimserver" }))).toThrow("/gone/fimserver");
  expect(() => findProgram(place(["fimserver"], { setting: "fimserver" }))).toThrow("full path");
});

test("a setting may begin with the home folder", () => {
  const path = `${homedir()}/x/fimserver`;
  expect(findProgram(place([path], { setting: "~/x/fimserver" }))?.path).toBe(path);
});

test("Windows has other paths and names", () => {
  const programs = ["C:\\code\\.venv\\Scripts\\fimserver.exe", "C:\\bin\\fimserver.exe"];
  const windows = { platform: "win32", folders: ["C:\\code"], path: "C:\\other;C:\\bin", own: "C:\\own" } as const;
  expect(findProgram(place(programs, windows))?.path).toBe(programs[0]);
  expect(findProgram(place(programs.slice(1), windows))?.path).toBe(programs[1]);
});

test("relative entries of PATH are ignored", () => {
  expect(onPath("uv", ".::bin:/usr/bin", "linux", [], () => true)).toBe("/usr/bin/uv");
  expect(onPath("uv", "", "linux", [], () => true)).toBeUndefined();
  const windows = ";.;bin;\\\\bin;C:bin;C:\\bin".replace("\\\\", "\\");
  expect(onPath("uv", windows, "win32", [], () => true)).toBe("C:\\bin\\uv.exe");
});

test("PATH finds nothing in a workspace that is not trusted", () => {
  const programs = ["/two/bin/fimserver", "/opt/bin/fimserver"];
  const path = "/two/bin:/two/../two/bin:/opt/bin";
  expect(findProgram(place(programs, { path }))?.path).toBe(programs[0]);
  expect(findProgram(place(programs, { path, trusted: false }))?.path).toBe(programs[1]);
  expect(findProgram(place(programs.slice(0, 1), { path, trusted: false }))).toBeUndefined();
  const windows = { platform: "win32", folders: ["C:\\Code"], path: "c:\\code\\bin;C:\\bin", trusted: false } as const;
  const found = findProgram(place(["c:\\code\\bin\\fimserver.exe", "C:\\bin\\fimserver.exe"], windows));
  expect(found?.path).toBe("C:\\bin\\fimserver.exe");
});

test("the user's own setting does not name a program in a workspace that is not trusted", () => {
  const setting = "/two/bin/fimserver";
  expect(findProgram(place([setting], { setting }))?.path).toBe(setting);
  expect(() => findProgram(place([setting], { setting, trusted: false }))).toThrow("Trust the workspace");
});
