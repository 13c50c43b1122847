import { expect, test } from "vitest";
import { Backoff, PAUSES_MS, STABLE_MS } from "../src/backoff";

test("waits longer each time, then gives up", () => {
  const backoff = new Backoff(() => 0);
  expect(PAUSES_MS.map(() => backoff.onEnded())).toEqual(PAUSES_MS);
  expect(backoff.onEnded()).toBeUndefined();
  expect(backoff.onEnded()).toBeUndefined();
});

test("a server that ran long begins anew", () => {
  let now = 0;
  const backoff = new Backoff(() => now);
  backoff.onEnded();
  backoff.onStarted();
  now += STABLE_MS;
  expect(backoff.onEnded()).toBe(PAUSES_MS[0]);
});

test("one that ended soon does not", () => {
  let now = 0;
  const backoff = new Backoff(() => now);
  backoff.onEnded();
  backoff.onStarted();
  now += STABLE_MS - 1;
  expect(backoff.onEnded()).toBe(PAUSES_MS[1]);
});

test("a person's restart begins anew", () => {
  const backoff = new Backoff(() => 0);
  for (const _ of [...PAUSES_MS, 0]) {
    backoff.onEnded();
  }
  backoff.reset();
  expect(backoff.onEnded()).toBe(PAUSES_MS[0]);
});
