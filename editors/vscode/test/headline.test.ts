import { expect, test } from "vitest";
import { HEADLINES, toSentence } from "../src/explain";
import { MOST, toParts, toText } from "../src/headline";

test.each([
  ["short", "Short", ""],
  ["fimserver: it is short.", "It is short", ""],
  [
    "The server does not start: No module named 'torch'. Its program is /home/me/.venv/bin/fimserver.",
    "The server does not start: No module named 'torch'",
    "Its program is /home/me/.venv/bin/fimserver.",
  ],
  [
    "Load the model /m? A repository can bring such a setting with it, so it is loaded only if you agree.",
    "Load the model /m?",
    "A repository can bring such a setting with it, so it is loaded only if you agree.",
  ],
  [
    "fimserver gives no completions: the file config.json of the model tiny is damaged; add the model again",
    "The file config.json of the model tiny is damaged",
    "Add the model again",
  ],
])("a message is split: %s", (message, headline, detail) => {
  expect(toParts(message)).toEqual({ headline, detail });
});

test("no headline is longer than what is seen at once, and nothing is lost", () => {
  const words = ["one", "two;", "three.", "four,", "(five)", "six:", "a".repeat(80), "seven?"];
  for (let i = 0; i < 500; i += 1) {
    const message = Array.from({ length: 1 + (i % 40) }, (_, j) => words[(i * 7 + j * j) % words.length]).join(" ");
    const parts = toParts(message);
    expect(parts.headline.length).toBeLessThanOrEqual(MOST);
    const letters = (text: string): string => text.toLowerCase().replace(/[^a-z]/g, "");
    expect(letters(toText(parts))).toContain(letters(message));
  }
});

test("each reason of the server has a short headline", () => {
  for (const [reason, headline] of Object.entries(HEADLINES)) {
    expect(headline.length).toBeLessThanOrEqual(MOST);
    const last = { outcome: "none", reason, detail: "a long explanation of what happened and what would change it" };
    const { text } = toSentence({ last, engine: { state: "ready", detail: "" } });
    expect(toParts(text).headline).toBe(headline);
  }
});
