// Bundles src/extension.ts into dist/extension.js: node scripts/build.mjs [--watch]

import { copyFileSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { context } from "esbuild";

const watch = process.argv.includes("--watch");
const build = await context({
  entryPoints: ["src/extension.ts"],
  outfile: "dist/extension.js",
  bundle: true,
  platform: "node",
  format: "cjs",
  target: "node20",
  external: ["vscode"],
  minify: !watch,
  sourcemap: watch,
  legalComments: "none",
  logLevel: "info",
  metafile: true,
});
if (watch) {
  await build.watch();
} else {
  const { metafile } = await build.rebuild();
  writeFileSync("dist/LICENSES.txt", licences(metafile));
  // vsce accepts only images from a web server; the walkthrough shows this one.
  writeFileSync("dist/README.md", readFileSync("README.md", "utf8").replace(/^!\[.*\n\n/m, ""));
  copyFileSync("../../fimserver/samples/inventory.py", "dist/sample.txt");
  await build.dispose();
}

/** Return the licences of all packages in the bundle. */
function licences(metafile) {
  const inside = Object.keys(metafile.inputs).map((path) => /^(.*node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(path)?.[1]);
  const texts = [...new Set(inside.filter((folder) => folder !== undefined))].sort().map((folder) => {
    const file = existsSync(folder) && readdirSync(folder).find((name) => /^licen[sc]e/i.test(name));
    if (!file) {
      throw new Error(`${folder} has no licence`);
    }
    return `${folder.replace(/^.*node_modules\//, "")}\n\n${readFileSync(`${folder}/${file}`, "utf8")}`;
  });
  return texts.join(`\n${"-".repeat(80)}\n\n`);
}
