import { expect, test } from "vitest";
import { chosenSettings, isLanguageOn, serverSettings } from "../src/chosen";

test("only settings that the user set are sent", () => {
  const values: Record<string, unknown> = { maxLines: 4, mode: "auto", seed: null };
  const configuration = {
    get: (name: string) => values[name],
    inspect: (name: string) => (name === "maxLines" ? { globalValue: 4 } : {}),
  };
  expect(chosenSettings(configuration, ["maxLines", "mode", "seed"])).toEqual({ maxLines: 4, mode: null, seed: null });
});

test("the extension's own settings are not the server's", () => {
  const properties = { "fimserver.serverPath": {}, "fimserver.trace.server": {}, "fimserver.mode": {} };
  expect(serverSettings(properties)).toEqual(["mode"]);
});

test("languages are on by default", () => {
  expect(isLanguageOn(undefined, "go")).toBe(true);
  expect(isLanguageOn({ go: false }, "go")).toBe(false);
  expect(isLanguageOn({ "*": false, go: true }, "go")).toBe(true);
  expect(isLanguageOn({ "*": false }, "go")).toBe(false);
});
