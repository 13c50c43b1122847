import { chmodSync, mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { lastLine, ServerProcess } from "../src/process";

const around = { cwd: tmpdir(), env: process.env };

function program(...lines: string[]): string {
  const path = join(mkdtempSync(join(tmpdir(), "fimserver-")), "fimserver");
  writeFileSync(path, ["#!/bin/sh", ...lines].join("\n"));
  chmodSync(path, 0o755);
  return path;
}

test.skipIf(process.platform === "win32")("the cause of a failure is its last line", async () => {
  const path = program("echo Traceback >&2", `echo "ModuleNotFoundError: No module named 'torch'" >&2`, "exit 1");
  expect(await (await ServerProcess.start(path, around)).cause()).toBe("No module named 'torch'");
  expect(await (await ServerProcess.start(program("exit 3"), around)).cause()).toBe("exit code 3");
  expect(await (await ServerProcess.start(program("kill -9 $$"), around)).cause()).toBe("ended by SIGKILL");
  expect(await (await ServerProcess.start(program("echo noise >&2"), around)).cause()).toBeUndefined();
});

test("a program that is not there is an error", async () => {
  await expect(ServerProcess.start(join(tmpdir(), "gone", "fimserver"), around)).rejects.toThrow("ENOENT");
});

test.skipIf(process.platform === "win32")("a process that does not end is ended", async () => {
  const process = await ServerProcess.start(program("exec sleep 60"), around);
  await process.end();
  expect(process.child.signalCode).toBe("SIGKILL");
});

test("the name of an exception is left out", () => {
  expect(lastLine("a\nValueError: wrong\n\n")).toBe("wrong");
  expect(lastLine("")).toBe("");
});
