import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { buildsFor, CancelledError, isCheckout, run, toSteps } from "../src/install";

const choice = { tool: "python", program: "/usr/bin/python3", build: "cpu", source: "fimserver==1" } as const;
const lines = (steps: ReturnType<typeof toSteps>): string[] =>
  steps.map((step) => [step.command, ...step.args].join(" "));

test("installing with Python", () => {
  expect(lines(toSteps(choice, "/own", "linux"))).toEqual([
    "/usr/bin/python3 -m venv /own",
    "/own/bin/python -m pip install --disable-pip-version-check --no-input --index-url https://download.pytorch.org/whl/cpu torch",
    "/own/bin/python -m pip install --disable-pip-version-check --no-input fimserver==1",
  ]);
});

test("installing with uv, for a GPU", () => {
  const uv = { ...choice, tool: "uv", program: "/bin/uv", build: "cuda" } as const;
  expect(lines(toSteps(uv, "/own", "linux"))).toEqual([
    "/bin/uv venv --python >=3.11 /own",
    "/bin/uv pip install --python /own/bin/python torch",
    "/bin/uv pip install --python /own/bin/python fimserver==1",
  ]);
});

test("installing with pipx into the extension's folder", () => {
  const [step] = toSteps({ ...choice, tool: "pipx", program: "/bin/pipx" }, "/own", "linux");
  expect(step?.env).toEqual({ PIPX_HOME: "/own/pipx", PIPX_BIN_DIR: "/own/bin" });
  expect(step?.args.at(-1)).toBe("fimserver==1");
});

test("macOS has one build", () => {
  expect(buildsFor("darwin")).toEqual(["cpu"]);
  expect(lines(toSteps(choice, "/own", "darwin")).join()).not.toContain("index-url");
});

const node = (code: string) => ({ title: "", command: process.execPath, args: ["-e", code] });

test("printed lines are passed on, and a failure has the last one as its message", async () => {
  const seen: string[] = [];
  const step = node("console.log('one'); console.error('no space left'); process.exitCode = 3");
  await expect(run(step, (line) => seen.push(line), new AbortController().signal)).rejects.toThrow("no space left");
  expect(seen).toContain("one");
});

test("a missing program is an error", async () => {
  const step = { title: "", command: "/gone/uv", args: [] };
  await expect(run(step, () => {}, new AbortController().signal)).rejects.toThrow("ENOENT");
});

test.skipIf(process.platform === "win32")("what was begun is ended, with all that it started", async () => {
  const abort = new AbortController();
  const child = "require('child_process').spawn('sleep', ['60']).pid";
  let pid = 0;
  const onLine = (line: string): void => {
    pid = Number(line);
    abort.abort();
  };
  const running = run(node(`console.log(${child}); setTimeout(() => {}, 60000)`), onLine, abort.signal);
  await expect(running).rejects.toThrow(CancelledError);
  await expect.poll(() => isAlive(pid)).toBe(false);
});

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    // If no process reaps orphans, one that has ended is still listed.
    return !(process.platform === "linux" && readFileSync(`/proc/${pid}/stat`, "utf8").includes(") Z "));
  } catch {
    return false;
  }
}

test("a checkout is recognized by its pyproject.toml", async () => {
  expect(await isCheckout("../..")).toBe(true);
  expect(await isCheckout(".")).toBe(false);
});
