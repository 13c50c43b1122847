import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, realpathSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { CancelledError, explainFailure, findTool, run, TORCH, toDoing, toSteps } from "../src/install";
import { surroundings } from "../src/outside";

const choice = { tool: "python", program: "/usr/bin/python3", build: "cpu", wheel: "/x/fim.whl", index: "" } as const;
const lines = (steps: ReturnType<typeof toSteps>): string[] =>
  steps.map((step) => [step.command, ...step.args].join(" "));

test("installing with Python", () => {
  expect(lines(toSteps(choice, "/own", "linux"))).toEqual([
    "/usr/bin/python3 -I -m venv /own",
    `/own/bin/python -I -m pip install --disable-pip-version-check --no-input --index-url https://download.pytorch.org/whl/cpu ${TORCH}`,
    "/own/bin/python -I -m pip install --disable-pip-version-check --no-input /x/fim.whl",
  ]);
});

test("installing with uv, for a GPU", () => {
  const uv = { ...choice, tool: "uv", program: "/bin/uv", build: "cuda" } as const;
  expect(lines(toSteps(uv, "/own", "linux"))).toEqual([
    "/bin/uv venv --python >=3.11 /own",
    `/bin/uv pip install --python /own/bin/python ${TORCH}`,
    "/bin/uv pip install --python /own/bin/python /x/fim.whl",
  ]);
});

test("a company's package index takes the place of PyTorch's", () => {
  const [, torch] = lines(toSteps({ ...choice, index: "https://mirror.example/simple" }, "/own", "linux"));
  expect(torch).toContain("--index-url https://mirror.example/simple torch");
});

test("macOS has one build", () => {
  expect(lines(toSteps(choice, "/own", "darwin")).join()).not.toContain("index-url");
});

test("torch is the release that README.md names", () => {
  expect(readFileSync("../../README.md", "utf8")).toContain(` ${TORCH} `);
});

test.each([
  ["Downloading torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (184.3 MB)", "torch, 184.3 MB"],
  ["  Downloading https://download.pytorch.org/whl/cpu/torch-2.13.0-cp311.whl (184.3 MB)", "torch, 184.3 MB"],
  ["Downloading tree_sitter_c_sharp-0.23.1-cp39-abi3.whl (0.4 MB)", "tree_sitter_c_sharp, 0.4 MB"],
  ["Downloading torch (175.2MiB)", "torch, 175.2 MB"],
  ["Installing collected packages: urllib3, tqdm, torch", "unpacking 3 packages"],
  ["Collecting torch", undefined],
])("progress is read from %s", (line, expected) => {
  expect(toDoing(line)).toBe(expected);
});

test("a failure names the package index, also where pip does not", () => {
  const printed = ["WARNING: Retrying after 'Failed to establish a new connection: Name or service not known'"];
  const args = ["--index-url", "https://download.pytorch.org/whl/cpu", "torch"];
  expect(explainFailure(printed, args)).toContain("does not find download.pytorch.org. Check");
});

test.each([
  [
    [
      "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\"HTTPSConnection(host='download.pytorch.org', port=443): Failed to establish a new connection: [Errno -3] Temporary failure in name resolution\")': /whl/cpu/torch/",
      "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)",
      "ERROR: No matching distribution found for torch",
    ],
    /^The network does not find download\.pytorch\.org\./,
  ],
  [
    [
      "error: Failed to fetch: `https://download.pytorch.org/whl/cpu/torch/`",
      "  Caused by: dns error",
      "  Caused by: failed to lookup address information: Name or service not known",
    ],
    /^The network does not find/,
  ],
  [["OSError: [Errno 28] No space left on device"], /^The disk is full\./],
  [["error: invalid peer certificate: UnknownIssuer"], /certificate is not trusted/],
  [["ERROR: Connection refused"], /^The server cannot be reached\./],
  [["some text", "ERROR: Package 'fimserver' requires a different Python"], /^Package 'fimserver' requires/],
  [["the last line"], /^the last line$/],
  [[], /^$/],
])("a failure is explained: %s", (printed, expected) => {
  expect(explainFailure(printed)).toMatch(expected);
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
      const tool = await findTool(path, process.platform, [repository], inside);
      expect(tool?.program ?? "/bin/none").toMatch(/^(?:\/usr)?\/bin\//);
      if (tool?.tool === "python") {
        const [make] = toSteps({ ...choice, program: tool.program }, join(root, "own"), process.platform);
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
