import { mkdirSync, mkdtempSync, realpathSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { isInside, surroundings } from "../src/outside";
import { onPath } from "../src/program";

test("names that begin alike are not inside", () => {
  expect(isInside("/one/x", ["/one"], "linux")).toBe(true);
  expect(isInside("/one", ["/one"], "linux")).toBe(true);
  expect(isInside("/one/..x", ["/one"], "linux")).toBe(true);
  expect(isInside("/one2/x", ["/one"], "linux")).toBe(false);
  expect(isInside("/one/../two/x", ["/two"], "linux")).toBe(true);
  expect(isInside("D:\\one\\x", ["C:\\one"], "win32")).toBe(false);
  expect(isInside("/x", ["/"], "linux")).toBe(true);
});

test.skipIf(process.platform === "win32")("links lead in and out of a workspace", () => {
  const root = realpathSync(mkdtempSync(join(tmpdir(), "fimserver-")));
  const workspace = join(root, "workspace");
  for (const folder of [workspace, join(root, "file"), join(root, "back")]) {
    mkdirSync(folder);
  }
  writeFileSync(join(workspace, "uv"), "", { mode: 0o755 });
  symlinkSync(join(workspace, "uv"), join(root, "file", "uv"));
  symlinkSync("workspace", join(root, "folder"));
  symlinkSync("/bin", join(workspace, "bin"));
  symlinkSync(join(workspace, "bin"), join(root, "bin"));
  symlinkSync("/bin/sh", join(workspace, "sh"));
  symlinkSync("../workspace/sh", join(root, "back", "uv"));
  symlinkSync("circle", join(root, "circle"));
  for (const path of ["file/uv", "folder", "folder/uv", "bin/sh", "back/uv"]) {
    expect(isInside(join(root, path), [workspace], process.platform), path).toBe(true);
  }
  expect(isInside(join(root, "workspace", "uv"), [join(root, "folder")], process.platform)).toBe(true);
  expect(isInside(join(root, "circle"), [workspace], process.platform)).toBe(false);
  const path = ["file", "folder", "back", "workspace"].map((name) => join(root, name)).join(":");
  expect(onPath("uv", path, process.platform, [workspace])).toBeUndefined();
  expect(onPath("uv", path, process.platform, [])).toBe(join(root, "file", "uv"));
});

test("child processes run outside the workspace, also if that is the home folder", () => {
  const home = realpathSync(mkdtempSync(join(tmpdir(), "fimserver-")));
  expect(surroundings(["/project"], true, {}, process.platform, home).cwd).toBe(home);
  const { cwd } = surroundings([home], true, {}, process.platform, home);
  expect(isInside(cwd, [home], process.platform)).toBe(false);
});

test("search paths have no relative entries, and none in a workspace that is not trusted", () => {
  const env = { PATH: ".::/project/bin:/usr/bin", PYTHONPATH: ".", VIRTUAL_ENV: "/project/.venv", HOME: "/home/me" };
  expect(surroundings(["/project"], false, env, "linux").env).toEqual({ PATH: "/usr/bin", HOME: "/home/me" });
  expect(surroundings(["/project"], true, env, "linux").env["PATH"]).toBe("/project/bin:/usr/bin");
  const windows = surroundings(["C:\\code"], false, { Path: "c:\\Code\\bin;.;C:\\bin" }, "win32").env;
  expect(windows).toEqual({ Path: "C:\\bin", NoDefaultCurrentDirectoryInExePath: "1" });
});
