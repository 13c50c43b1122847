import { expect, test } from "vitest";
import { Backoff, PAUSES_MS, STABLE_MS } from "../src/backoff";

test("the delay grows with each attempt until restarts end", () => {
  const backoff = new Backoff(() => 0);
  expect(PAUSES_MS.map(() => backoff.onEnded())).toEqual(PAUSES_MS);
  expect(backoff.onEnded()).toBeUndefined();
  expect(backoff.onEnded()).toBeUndefined();
});

test("a server that ran long enough resets the attempts", () => {
  let now = 0;
  const backoff = new Backoff(() => now);
  backoff.onEnded();
  backoff.onStarted();
  now += STABLE_MS;
  expect(backoff.onEnded()).toBe(PAUSES_MS[0]);
});

test("a server that ended soon does not reset the attempts", () => {
  let now = 0;
  const backoff = new Backoff(() => now);
  backoff.onEnded();
  backoff.onStarted();
  now += STABLE_MS - 1;
  expect(backoff.onEnded()).toBe(PAUSES_MS[1]);
});

test("a restart by the user resets the attempts", () => {
  const backoff = new Backoff(() => 0);
  for (const _ of [...PAUSES_MS, 0]) {
    backoff.onEnded();
  }
  backoff.reset();
  expect(backoff.onEnded()).toBe(PAUSES_MS[0]);
});
