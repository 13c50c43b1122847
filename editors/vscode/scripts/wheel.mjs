// Builds the server's wheel into dist/, from which the extension installs it: node scripts/wheel.mjs
//
// Python is $FIMSERVER_PYTHON, that of the checkout's .venv, or python3. $FIMSERVER_WHEEL is a wheel that exists already.

import { execFileSync } from "node:child_process";
import { copyFileSync, existsSync, mkdirSync, readdirSync, rmSync } from "node:fs";
import { basename, join, resolve } from "node:path";

const root = resolve("../..");
const own = join(root, ".venv", ...(process.platform === "win32" ? ["Scripts", "python.exe"] : ["bin", "python"]));
const python = process.env.FIMSERVER_PYTHON ?? (existsSync(own) ? own : "python3");
mkdirSync("dist", { recursive: true });
for (const file of readdirSync("dist").filter((name) => name.endsWith(".whl"))) {
  rmSync(join("dist", file));
}
if (process.env.FIMSERVER_WHEEL) {
  copyFileSync(process.env.FIMSERVER_WHEEL, join("dist", basename(process.env.FIMSERVER_WHEEL)));
  process.exit();
}
const options = ["--no-deps", "--quiet", "--disable-pip-version-check"];
execFileSync(python, ["-m", "pip", "wheel", ...options, "--wheel-dir", resolve("dist"), root], { stdio: "inherit" });
rmSync(join(root, "build"), { recursive: true, force: true }); // a later build would pack what was deleted since
