// Drives pages of a headless Chromium: JSON lines in, JSON lines out.
//
//   node driver.mjs PLAYWRIGHT CHROMIUM
//   {"id": 1, "do": "open", "url": "..."}           -> {"id": 1, "value": 0}    the page's number
//   {"id": 2, "do": "evaluate", "page": 0, "code": "document.title"}
//   {"id": 3, "do": "type", "page": 0, "text": "abc", "delay": 20}, press (key), click (selector, count), hover
//   {"id": 4, "do": "screenshot", "page": 0, "path": "...", "clip": null}, close
//
// A failure is answered with {"id": 1, "error": "..."}.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [playwright, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const browser = await chromium.launch({
  executablePath,
  args: [...args, "--disable-component-update", "--disable-sync"],
});
const pages = [];

const actions = {
  async open({ url, width = 1000, height = 640 }) {
    // A context of its own: windows share no storage, so each starts as if it were the first.
    const context = await browser.newContext({ viewport: { width, height } });
    const page = await context.newPage();
    page.setDefaultTimeout(30_000);
    await page.goto(url, { waitUntil: "domcontentloaded" });
    return pages.push(page) - 1;
  },
  evaluate: ({ page, code }) => pages[page].evaluate(code),
  type: ({ page, text, delay = 0 }) => pages[page].keyboard.type(text, { delay }),
  press: ({ page, key }) => pages[page].keyboard.press(key),
  click: ({ page, selector, count = 1, modifiers = [] }) =>
    pages[page].locator(selector).first().click({ clickCount: count, modifiers }),
  hover: ({ page, selector }) => pages[page].locator(selector).first().hover(),
  screenshot: ({ page, path, clip }) => pages[page].screenshot({ path, ...(clip ? { clip } : {}) }),
  close: ({ page }) => pages[page].context().close(),
};

async function answer(line) {
  const { id, do: name, ...parameters } = JSON.parse(line);
  try {
    const value = await actions[name](parameters);
    return { id, value: value ?? null };
  } catch (error) {
    return { id, error: String(error.message).split("\n", 4).join(" ") };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(await answer(line))}\n`);
}
await browser.close();
