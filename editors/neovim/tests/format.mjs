// Formats Lua files by .stylua.toml, or says which are not formatted: node format.mjs [--check] FOLDER FILES.
// FOLDER has npm's @johnnymorganz/stylua in it: StyLua as WebAssembly, which fetches no program.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const args = process.argv.slice(2);
const check = args[0] === "--check" && args.shift();
const [folder, ...files] = args;
const stylua = createRequire(`${folder}/`)("@johnnymorganz/stylua");
const toml = readFileSync(new URL("../.stylua.toml", import.meta.url), "utf8");
const setting = (name) => new RegExp(`^${name} = "?(\\w+)"?`, "m").exec(toml)[1];

function config() {
  const made = stylua.Config.new();
  made.column_width = Number(setting("column_width"));
  made.indent_type = stylua.IndentType[setting("indent_type")];
  made.indent_width = Number(setting("indent_width"));
  made.quote_style = stylua.QuoteStyle[setting("quote_style")];
  return made;
}

let bad = 0;
for (const file of files) {
  const before = readFileSync(file, "utf8");
  const after = stylua.formatCode(before, config(), undefined, stylua.OutputVerification.None);
  if (after !== before) {
    bad += 1;
    console.log(file);
    if (!check) writeFileSync(file, after);
  }
}
process.exit(check && bad ? 1 : 0);
