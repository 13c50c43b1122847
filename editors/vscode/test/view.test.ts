import { expect, test } from "vitest";
import { INITIAL, namesOf, toMenu, toSnoozes, toStatus, type View } from "../src/view";

const READY: View = {
  ...INITIAL,
  phase: "ready",
  engine: "tiny on cpu",
  detail: "tiny on cpu",
  learned: ["python"],
};
const PYTHON = { id: "python", enabled: true, learned: true, onByDefault: true };
const GO = { ...PYTHON, id: "go", learned: false };

const headline = (more: Partial<View>, language = PYTHON): string => toStatus({ ...READY, ...more }, language).headline;
const labels = (view: View, language = PYTHON): string[] => toMenu(view, language).map((item) => item.label);

test("each state has a headline", () => {
  expect(headline({})).toBe("Ready");
  expect(headline({ thinking: true })).toBe("Thinking");
  expect(headline({ phase: "loading" })).toBe("The model is loading");
  expect(headline({ snoozedMinutes: 1 })).toBe("Snoozed for 1 minute");
  expect(headline({ snoozedMinutes: 4 })).toBe("Snoozed for 4 minutes");
  expect(headline({ enabled: false, snoozedMinutes: 4 })).toBe("Off");
  expect(headline({}, { ...PYTHON, enabled: false })).toBe("Off for python");
  expect(headline({ phase: "missing" })).toContain("not installed");
});

test("model and device are shown", () => {
  expect(toStatus(READY, PYTHON).lines).toEqual(["Model: tiny, on cpu"]);
  expect(toStatus({ ...READY, engine: "" }, PYTHON).lines).toEqual([]);
});

test("a server that gets the code is shown", () => {
  const detail = "qwen at http://10.0.0.1:8000 (vllm)";
  const status = toStatus({ ...READY, engine: detail, detail, server: "http://10.0.0.1:8000" }, PYTHON);
  expect(status.text).toContain("$(cloud)");
  expect(status.lines).toEqual([`Engine: ${detail}`, "Code is sent to http://10.0.0.1:8000"]);
  expect(toStatus(READY, PYTHON).text).toContain("$(sparkle)");
  const down = toStatus({ ...READY, engine: "tiny answers on this machine: the server is late" }, PYTHON);
  expect(down.lines).toEqual(["Engine: tiny answers on this machine: the server is late"]);
});

test("an error is shown with its fix", () => {
  const status = toStatus({ ...READY, phase: "failed", detail: "The weights are torn; fetch them again." }, PYTHON);
  expect(status.severity).toBe("error");
  expect(status.lines).toEqual(["The weights are torn; fetch them again."]);
});

test("an untrusted workspace is shown", () => {
  expect(toStatus({ ...READY, trusted: false }, PYTHON).lines.join(" ")).toContain("not trusted");
});

test.each([{ refusedModel: "/m" }, { refusedServer: "http://10.0.0.1" }])(
  "an unanswered question is a warning",
  (more) => {
    const status = toStatus({ ...READY, ...more }, PYTHON);
    expect(status.severity).toBe("warning");
    expect(status.headline).toContain("not allowed");
    expect(status.lines.join()).toContain(Object.values(more)[0]);
    expect(labels({ ...READY, ...more })[0]).toBe("$(warning) Allow or refuse");
  },
);

test("a name of no model is not a question", () => {
  const view = { ...READY, refusedModel: "qwen", refusedReason: "not_found" };
  expect(toStatus(view, PYTHON).headline).toBe("Model not found");
  expect(toMenu(view, PYTHON)[0]?.action?.kind).toBe("settings");
});

test("prose is completed on request", () => {
  expect(headline({}, { ...PYTHON, id: "markdown", enabled: false, onByDefault: false })).toBe(
    "On request for markdown",
  );
});

test("a language that the model has not learned is a state", () => {
  const status = toStatus(READY, GO);
  expect(status.text).toBe("$(sparkle) fimserver: Python only");
  expect(status.lines[0]).toContain("has not learned go");
  expect(labels(READY, GO)[0]).toBe("$(mortar-board) Get a model for go");
  expect(labels(READY).join()).not.toContain("Get a model");
  expect(toStatus(READY, { ...GO, enabled: false }).headline).toBe("Off for go");
  expect(toStatus({ ...READY, phase: "loading" }, GO).headline).toBe("The model is loading");
  expect(namesOf(["python", "go", "rust"])).toBe("Python, Go, ...");
});

test("the menu has the actions that are possible now, and each of them once", () => {
  expect(labels(READY)).toContain("$(bell-slash) Snooze...");
  expect(labels(READY)).toContain("$(circle-slash) Turn off...");
  expect(labels({ ...READY, snoozedMinutes: 3 })).toContain("$(bell) End the snooze");
  expect(labels({ ...READY, enabled: false })).toContain("$(check) Turn on");
  expect(labels(READY, { ...GO, enabled: false })).toContain("$(check) Turn on for go");
  expect(labels({ ...READY, phase: "failed" }).join()).not.toContain("Snooze");
  expect(labels({ ...READY, phase: "missing" })[0]).toContain("Install");
  for (const view of [READY, { ...READY, refusedModel: "/m" }, { ...READY, snoozedMinutes: 3 }]) {
    const kinds = toMenu(view, GO).flatMap(({ action }) => (action === undefined ? [] : [action.kind]));
    expect(new Set(kinds).size).toBe(kinds.length); // each once
    expect(kinds.length).toBeLessThanOrEqual(10);
  }
});

test("a snooze that runs can be ended or changed", () => {
  expect(toSnoozes(READY)).toHaveLength(4);
  expect(toSnoozes({ ...READY, snoozedMinutes: 3 })[0]?.label).toContain("End");
});
