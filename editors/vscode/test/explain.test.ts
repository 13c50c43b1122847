import { expect, test } from "vitest";
import { toSentence } from "../src/explain";

const engine = { state: "ready", detail: "tiny on cpu" };

test("an empty answer has its reason and a remedy", () => {
  const last = { outcome: "empty", reason: "snoozed", detail: "completions are snoozed for 5 minutes" };
  expect(toSentence({ last, engine })).toEqual({
    text: "Snoozed. Completions are snoozed for 5 minutes.",
    remedy: "endSnooze",
  });
});

test("a completion is explained by its source", () => {
  const last = { outcome: "offered", source: "model", timings_ms: { total: 123.4 } };
  expect(toSentence({ last, engine }).text).toBe("There was a completion after 123 ms. The model wrote it.");
});

test("no request yet", () => {
  expect(toSentence({ last: null, engine }).text).toContain("tiny on cpu");
});
