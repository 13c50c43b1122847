import { expect, test } from "vitest";
import { INITIAL, toMenu, toStatus, type View } from "../src/view";

const READY: View = { ...INITIAL, phase: "ready", engine: "tiny on cpu", detail: "tiny on cpu" };
const PYTHON = { id: "python", enabled: true };

const headline = (more: Partial<View>, language = PYTHON): string => toStatus({ ...READY, ...more }, language).headline;
const labels = (view: View, language = PYTHON): string[] => toMenu(view, language, true).map((item) => item.label);

test("each state has a headline", () => {
  expect(headline({})).toBe("Ready");
  expect(headline({ thinking: true })).toBe("Thinking");
  expect(headline({ phase: "loading" })).toBe("The model is loading");
  expect(headline({ snoozedMinutes: 1 })).toBe("Snoozed for 1 minute");
  expect(headline({ snoozedMinutes: 4 })).toBe("Snoozed for 4 minutes");
  expect(headline({ enabled: false, snoozedMinutes: 4 })).toBe("Off");
  expect(headline({}, { id: "python", enabled: false })).toBe("Off for python");
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
  expect(toStatus({ ...READY, refusedServer: "http://10.0.0.1" }, PYTHON).lines.join()).toContain(
    "have not allowed it",
  );
});

test("an error is shown with its fix", () => {
  const status = toStatus({ ...READY, phase: "failed", detail: "The weights are torn; fetch them again." }, PYTHON);
  expect(status.severity).toBe("error");
  expect(status.lines).toEqual(["The weights are torn; fetch them again."]);
});

test("an untrusted workspace and a refused model are shown", () => {
  const { lines } = toStatus({ ...READY, trusted: false, refusedModel: "/m" }, PYTHON);
  expect(lines.join(" ")).toMatch(/not trusted.*\/m/);
});

test("the menu has the actions that are possible now", () => {
  expect(labels(READY).filter((label) => label.includes("Snooze"))).toHaveLength(4);
  expect(labels({ ...READY, snoozedMinutes: 3 })).toContain("$(bell) End the snooze");
  expect(labels({ ...READY, enabled: false })).toContain("$(check) Turn on in this workspace");
  expect(labels(READY, { id: "go", enabled: false })).toContain("$(check) Turn on for go");
  expect(labels({ ...READY, phase: "failed" }).join()).not.toContain("Snooze");
  expect(labels({ ...READY, phase: "missing" })[0]).toContain("Install");
});
