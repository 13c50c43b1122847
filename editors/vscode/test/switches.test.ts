import { expect, test } from "vitest";
import { ownSettings } from "../src/chosen";
import { withLanguage, withoutLanguage } from "../src/switches";

test("turning a language off and on again leaves nothing in the settings", () => {
  const off = withoutLanguage(undefined, "go");
  expect(off).toEqual({ go: false });
  expect(withLanguage(off, "go", false)).toBeUndefined();
  expect(withLanguage({ go: false, lua: false }, "go", false)).toEqual({ lua: false });
});

test("a language that is off without an entry gets one", () => {
  expect(withLanguage({ "*": false }, "go", true)).toEqual({ "*": false, go: true });
  expect(withLanguage(undefined, "markdown", true)).toEqual({ markdown: true });
});

test("a setting is the user's own only where no file of the workspace has it", () => {
  const values: Record<string, object> = {
    mine: { globalValue: 1 },
    theirs: { workspaceValue: 1 },
    both: { globalValue: 1, workspaceValue: 2 },
    inFolder: { globalValue: 1, workspaceFolderValue: 2 },
    unset: {},
  };
  const configuration = { get: () => 1, inspect: (name: string) => values[name] };
  const names = Object.keys(values);
  expect(ownSettings(configuration, names, undefined)).toEqual({ mine: 1 });
  expect(ownSettings(configuration, names, "ssh-remote")).toEqual({ mine: 1 });
  expect(ownSettings(configuration, names, "dev-container")).toEqual({});
});
