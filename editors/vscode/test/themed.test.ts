import { expect, test } from "vitest";
import { toThemed } from "../src/themed";

test("the theme's colours come after the page's own", () => {
  const page = toThemed("<html><head><style>:root{--back:#fff}</style></head><body></body></html>");
  expect(page).toMatch(/#fff.*--vscode-editor-background.*<\/head>/s);
});
