import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, realpathSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { buildsFor, CancelledError, findTools, isCheckout, run, toSteps } from "../src/install";
import { surroundings } from "../src/outside";

const choice = { tool: "python", program: "/usr/bin/python3", build: "cpu", source: "fimserver==1" } as const;
const lines = (steps: ReturnType<typeof toSteps>): string[] =>
  steps.map((step) => [step.command, ...step.args].join(" "));

test("installing with Python", () => {
  expect(lines(toSteps(choice, "/own", "linux"))).toEqual([
    "/usr/bin/python3 -I -m venv /own",
    "/own/bin/python -I -m pip install --disable-pip-version-check --no-input --index-url https://download.pytorch.org/whl/cpu torch",
    "/own/bin/python -I -m pip install --disable-pip-version-check --no-input fimserver==1",
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

const around = surroundings([], true);
const node = (code: string) => ({ title: "", command: process.execPath, args: ["-e", code] });

test("printed lines are passed on, and a failure has the last one as its message", async () => {
  const seen: string[] = [];
  const step = node("console.log('one'); console.error('no space left'); process.exitCode = 3");
  await expect(run(step, around, (line) => seen.push(line), new AbortController().signal)).rejects.toThrow(
    "no space left",
  );
  expect(seen).toContain("one");
});

test("a missing program is an error", async () => {
  const step = { title: "", command: "/gone/uv", args: [] };
  await expect(run(step, around, () => {}, new AbortController().signal)).rejects.toThrow("ENOENT");
});

test.skipIf(process.platform === "win32")("what was begun is ended, with all that it started", async () => {
  const abort = new AbortController();
  const child = "require('child_process').spawn('sleep', ['60']).pid";
  let pid = 0;
  const onLine = (line: string): void => {
    pid = Number(line);
    abort.abort();
  };
  const running = run(node(`console.log(${child}); setTimeout(() => {}, 60000)`), around, onLine, abort.signal);
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

test.skipIf(process.platform === "win32")(
  "a hostile repository's files do not run while tools are sought",
  async () => {
    const root = realpathSync(mkdtempSync(join(tmpdir(), "fimserver-")));
    const repository = join(root, "repository");
    const marker = join(root, "ran");
    const home = join(root, "home");
    mkdirSync(join(repository, "bin"), { recursive: true });
    mkdirSync(home);
    for (const folder of [repository, join(repository, "bin")]) {
      for (const name of ["uv", "pipx", "python3", "python", "fimserver"]) {
        writeFileSync(join(folder, name), `#!/bin/sh\necho ${name} >> ${marker}\n`);
        chmodSync(join(folder, name), 0o755);
      }
    }
    for (const name of ["venv", "ensurepip", "sysconfig"]) {
      writeFileSync(join(repository, `${name}.py`), `open(${JSON.stringify(marker)}, "a").write("${name}")\n`);
    }
    const path = [".", "", "bin", repository, join(repository, "bin"), "/usr/bin", "/bin"].join(":");
    const environment = { ...process.env, PATH: path, PYTHONPATH: repository };
    const inside = surroundings([repository], false, environment, process.platform, home);
    expect(inside.cwd).toBe(home);
    expect(inside.env["PATH"]).toBe("/usr/bin:/bin");
    expect(inside.env).not.toHaveProperty("PYTHONPATH");
    const before = process.cwd();
    process.chdir(repository);
    try {
      const tools = await findTools(path, process.platform, [repository], inside);
      expect(tools.filter(({ program }) => !program.startsWith("/usr/bin/") && !program.startsWith("/bin/"))).toEqual(
        [],
      );
      for (const { program } of tools.filter(({ tool }) => tool === "python")) {
        const choice = { tool: "python", program, build: "cpu", source: "x" } as const;
        const [make] = toSteps(choice, join(root, "own"), process.platform);
        if (make !== undefined) {
          const step = { ...make, args: [...make.args, "--without-pip"] };
          await run(step, { cwd: repository, env: environment }, () => {}, new AbortController().signal);
        }
      }
      const seen: string[] = [];
      await run(node("console.log(process.cwd())"), inside, (line) => seen.push(line), new AbortController().signal);
      expect(seen).toEqual([home]);
    } finally {
      process.chdir(before);
    }
    expect(existsSync(marker) && readFileSync(marker, "utf8")).toBe(false);
  },
);
