"""A real VS Code workbench without a screen: code-server in a headless Chromium, with the packaged extension in it.

    find_vscode()     Node 24, code-server and playwright-core from npm, Chromium from the system
    package()         the extension, as it would be installed
    Workbench         one code-server with the extension, a folder, and windows on it
    Window            one page: keys, what is on the screen, pictures

Downloads are kept in ~/.cache/fimserver/editors/vscode (or $FIMSERVER_EDITORS/vscode). If something is not available,
``UnavailableError`` names it.

    python tests/support/vscode.py latency          key to ghost text on the screen; also for a server without a model
    python tests/support/vscode.py open FOLDER      a workbench with the extension, to look at with a browser
"""

import itertools
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from support import debian, real_editors
from support.real_editors import (
    FIMSERVER,
    LINE,
    LINES,
    ROOT,
    SAMPLE,
    SAMPLE_FILE,
    SLOW_S,
    Stub,
    UnavailableError,
    fimserver_home,
    print_latency,
    run,
    wait_until,
    write_script,
)

EXTENSION = ROOT / "editors" / "vscode"
CACHE = real_editors.CACHE / "vscode"
_NODE = "24"
_CODE_SERVER = "code-server@4.139.1"
_PLAYWRIGHT = "playwright-core@1.65.1"
_NATIVE = [f"@vscode/{name}" for name in ("spdlog", "native-watchdog", "sqlite3", "deviceid")]
THEMES = {"light": "Default Light Modern", "dark": "Default Dark Modern", "contrast": "Default High Contrast"}
_QUIET = {  # without these a chat panel takes the keyboard, pages of news come up, popups race with ghost text
    "workbench.startupEditor": "none",
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "chat.disableAIFeatures": True,
    "extensions.autoUpdate": False,
    "extensions.autoCheckUpdates": False,
    "telemetry.telemetryLevel": "off",
    "security.workspace.trust.startupPrompt": "never",
    "workbench.tips.enabled": False,
    "workbench.colorTheme": THEMES["light"],
    "editor.minimap.enabled": False,
    "editor.quickSuggestions": False,
    "files.autoSave": "off",
    "fimserver.minConfidence": 0,  # these tests are about the editor: what is offered need not be likely
    "git.enabled": False,
    "terminal.integrated.gpuAcceleration": "off",  # so that its text can be read
}


@dataclass(frozen=True)
class VSCode:
    """Programs that are ready to run."""

    node: Path
    code_server: Path
    playwright: Path
    chromium: Path


def find_vscode() -> VSCode:
    """All that the workbench needs, fetched where it is not yet in the cache. Raises ``UnavailableError``."""
    if shutil.which("npm") is None:
        message = "npm is not installed"
        raise UnavailableError(message)
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        package = f"node-{sys.platform}-{machine}"  # what the package "node" would fetch by a script
        node = _install("node24", f"{package}@{_NODE}") / package / "bin" / "node"
        env = {"PATH": f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        code_server = _install("server", _CODE_SERVER, env=env, finish=_finish_code_server) / "code-server"
        playwright = _install("driver", _PLAYWRIGHT, env=env) / "playwright-core"
        chromium = _find_chromium()
    return VSCode(node, code_server / "out" / "node" / "entry.js", playwright, chromium)


def _install(
    name: str,
    package: str,
    *,
    env: dict[str, str] | None = None,
    finish: Callable[[Path, dict[str, str]], None] | None = None,
) -> Path:
    """A package in a folder of its own; the folder's ``node_modules``."""
    folder = CACHE / name
    modules = folder / "node_modules"
    done = folder / "done"
    if not done.exists() or done.read_text(encoding="utf-8") != package:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package, cwd=folder, env=env)
        if finish is not None:
            finish(modules, env or {})
        done.write_text(package, encoding="utf-8")
    return modules


def _finish_code_server(modules: Path, env: dict[str, str]) -> None:
    """Its VS Code has packages of its own, some of which are compiled."""
    lacks = shutil.which("g++") is None or shutil.which("make") is None
    if lacks and (message := debian.install("g++", "make", "python3")):
        raise UnavailableError(message)
    vscode = modules / "code-server" / "lib" / "vscode"
    run("npm", "install", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund", cwd=vscode, env=env)
    run("npm", "rebuild", *_NATIVE, cwd=vscode, env=env)


def _find_chromium() -> Path:
    names = ("chromium", "chromium-browser", "google-chrome")
    if (found := next(filter(None, map(shutil.which, names)), None)) is not None:
        return Path(found)
    if message := debian.install("chromium"):
        raise UnavailableError(message)
    return Path("/usr/bin/chromium")


def prepare() -> None:
    """The extension's own packages. Raises ``UnavailableError``."""
    lock = EXTENSION / "package-lock.json"
    stamp = EXTENSION / "node_modules" / ".stamp"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
            run("npm", "ci", "--no-audit", "--no-fund", cwd=EXTENSION)
            stamp.write_bytes(lock.read_bytes())


def package(folder: Path) -> Path:
    """Build the extension as one file. Raises ``UnavailableError``."""
    prepare()
    return pack(EXTENSION, folder / "fimserver.vsix")


def pack(source: Path, vsix: Path) -> Path:
    """Any extension as one file; the packages of ours are there already."""
    try:
        options = [] if source == EXTENSION else ["--allow-missing-repository", "--skip-license"]
        run(EXTENSION / "node_modules" / ".bin" / "vsce", "package", *options, "-o", vsix, cwd=source)
    except UnavailableError as error:  # all that it needs is here
        raise AssertionError(str(error)) from error
    return vsix


def names_in(vsix: Path) -> list[str]:
    """Files of a packaged extension."""
    with zipfile.ZipFile(vsix) as archive:
        return archive.namelist()


def size_in(vsix: Path, name: str) -> int:
    """Compressed size of a file in a packaged extension, in bytes."""
    with zipfile.ZipFile(vsix) as archive:
        return archive.getinfo(name).compress_size


class Browser:
    """A headless Chromium that runs ``driver.mjs``."""

    def __init__(self, vscode: VSCode) -> None:
        command = [vscode.node, EXTENSION / "test" / "driver.mjs", vscode.playwright, vscode.chromium]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ids = itertools.count(1)

    def do(self, action: str, **parameters: Any) -> Any:
        """Have one thing done; raises ``AssertionError`` with what the browser says."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"id": next(self._ids), "do": action, **parameters}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the browser has ended"
        answer = json.loads(line)
        if "error" in answer:
            message = f"{action}: {answer['error']}"
            raise AssertionError(message)
        return answer["value"]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


_GHOST = """(() => {
  const parts = [...document.querySelectorAll('.monaco-editor')].flatMap(editor =>
    [...editor.querySelectorAll('.view-lines [class*="ghost-text"], .view-zones [class*="ghost-text"], ' +
      '.suggest-preview-text')]);
  const lineOf = part => part.closest('.view-line') ?? part;
  const texts = parts.map((part, i) =>
    (i === 0 || lineOf(part) === lineOf(parts[i - 1]) ? '' : '\\n') + part.textContent);
  return texts.join('').replace(/\\u00a0/g, ' ').replace(/\\u200b/g, '');
})()"""
_LINES = """(isWithGhost => {
  const lines = [...document.querySelectorAll('.editor-instance .monaco-editor .view-lines .view-line')];
  lines.sort((one, other) => parseFloat(one.style.top) - parseFloat(other.style.top));
  return lines.map(line => {
    const part = line.cloneNode(true);
    if (!isWithGhost)
      part.querySelectorAll('[class*="ghost-text"], .suggest-preview-text').forEach(ghost => ghost.remove());
    return part.textContent.replace(/\\u00a0/g, ' ').replace(/\\u200b/g, '');
  });
})"""
_IS_STILL = """document.getAnimations().every(animation =>
  animation.playState !== 'running' || animation.effect?.getComputedTiming().endTime === Infinity)"""
_TEXTS = "[...document.querySelectorAll({selector})].map(node => node.textContent.replace(/\\u00a0/g, ' '))"
_PICK = ".quick-input-widget:not([style*='display: none'])"
_TYPED = _PICK + " input:focus"  # before it has the focus, keys go to the editor below it
_CHOSEN = _PICK + " .quick-input-list .monaco-list-row.focused"
_STATUS = ".statusbar-item[id*='fimserver.status']"


class Window:
    """One page with a workbench."""

    def __init__(self, browser: Browser, url: str, width: int = 1000, height: int = 640) -> None:
        self._browser = browser
        self._page = browser.do("open", url=url, width=width, height=height)
        wait_until(lambda: self.has(".monaco-workbench .statusbar"), "the workbench is there", 90)

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._browser.do("evaluate", page=self._page, code=code)

    def press(self, *keys: str) -> None:
        """Press keys, by their names: Tab, Control+s."""
        for key in keys:
            self._browser.do("press", page=self._page, key=key)

    def type(self, text: str, delay_ms: int = 0) -> None:
        """Type a text."""
        self._browser.do("type", page=self._page, text=text, delay=delay_ms)

    def click(self, selector: str, count: int = 1) -> None:
        """Click on the first of what a selector finds."""
        self._browser.do("click", page=self._page, selector=selector, count=count)

    def hover(self, selector: str) -> None:
        """Put the mouse there."""
        self._browser.do("hover", page=self._page, selector=selector)

    def has(self, selector: str) -> bool:
        """Whether anything fits the selector."""
        return bool(self.evaluate(f"document.querySelector({json.dumps(selector)}) !== null"))

    def texts(self, selector: str) -> list[str]:
        """Texts of all that a selector finds."""
        found: list[str] = self.evaluate(_TEXTS.replace("{selector}", json.dumps(selector)))
        return found

    def screenshot(self, path: Path, clip: dict[str, int] | None = None) -> None:
        """A picture of the page, or of a part of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        wait_until(lambda: self.evaluate(_IS_STILL), "nothing fades in or out")
        self._browser.do("screenshot", page=self._page, path=str(path), clip=clip)

    def ghost(self) -> str:
        """The ghost text on the screen; empty without one."""
        return str(self.evaluate(_GHOST))

    def lines(self) -> list[str]:
        """Lines of the editor that has them on the screen, ghost text and all."""
        found: list[str] = self.evaluate(_LINES + "(true)")
        return found

    def written(self) -> list[str]:
        """The same lines without ghost text."""
        found: list[str] = self.evaluate(_LINES + "(false)")
        return found

    def take_ghost(self) -> None:
        """Press Tab until the ghost text is text; another ghost text may follow it at once."""
        before = self.written()
        self.press("Tab")
        wait_until(lambda: self.written() != before, "the ghost text is text")

    def wait_for_ghost(self, timeout: float = SLOW_S) -> str:
        """Wait for ghost text and return it."""
        try:
            return str(wait_until(self.ghost, "ghost text", timeout))
        except AssertionError:
            message = f"no ghost text within {timeout:.0f} s; status {self.status()!r}; lines {self.lines()}"
            raise AssertionError(message) from None

    def type_until_ghost(self, key: str) -> str:
        """Type a character, and again if nothing came: a busy machine can make an answer late."""
        for _ in range(3):
            self.type(key)
            with suppress(AssertionError):
                return self.wait_for_ghost(6)
            self.press("Backspace")
        self.type(key)
        return self.wait_for_ghost()

    def begin(self, file: Path) -> str:
        """Open a copy of the sample and type its line on; the ghost text that comes."""
        self.open(file)
        self.go(LINE)
        return self.type_until_ghost("p")

    def open(self, file: Path, *, focus: bool = True) -> None:
        """Open a file by its path; the cursor is in it then."""
        self.press("Escape", "Control+p")
        wait_until(lambda: self.has(_TYPED), "quick open is there")
        self.type(str(file))
        wait_until(lambda: any(file.name in text for text in self.texts(_CHOSEN)), f"{file} is found")
        self.press("Enter")
        tab = f".tabs-container .tab.active[data-resource-name='{file.name}']"
        wait_until(lambda: self.has(tab), f"{file.name} is open")
        if focus:
            line = ".editor-container .monaco-editor.focused .view-line"
            wait_until(lambda: self.has(line), f"{file.name} has the focus")

    def go(self, line: int, column: int | None = None) -> None:
        """Put the cursor into a line counted from 1, at its end or a column."""
        self.press("Escape", "Control+g")
        wait_until(lambda: self.has(_TYPED), "go to line is there")
        self.type(str(line) if column is None else f"{line}:{column}")
        self.press("Enter")
        wait_until(lambda: self.has(".editor-container .monaco-editor.focused"), "the editor has the focus")
        wait_until(lambda: any(f"Ln {line}," in text for text in self.texts(".statusbar-item")), f"line {line}")
        if column is None:
            self.press("End")

    def command(self, title: str) -> None:
        """Run a command of the palette."""
        for _ in range(3):
            with suppress(AssertionError):  # in a window that has just come up a key may be lost
                self.press("F1")
                wait_until(lambda: self.has(_TYPED), "the palette is there", 10)
                self.type(title)
                wait_until(lambda: any(title.lower() in text.lower() for text in self.texts(_CHOSEN)), title, 10)
                self.press("Enter")
                return
            self.evaluate("document.activeElement?.blur()")  # a page in a frame may have taken the key
            self.press("Escape")
        message = f"the command {title} is not found"
        raise AssertionError(message)

    def save(self, file: Path) -> bytes:
        """Save the file; return its content on the disk."""
        self.press("Control+s")
        wait_until(lambda: not self.has(".tabs-container .tab.active.dirty"), "the file is saved")
        return file.read_bytes()

    def status(self) -> str:
        """What the status item says to a screen reader: name, state, model and device."""
        code = f"document.querySelector({json.dumps(_STATUS + ' a')})?.getAttribute('aria-label') ?? ''"
        return str(self.evaluate(code))

    def wait_for_status(self, *words: str, timeout: float = SLOW_S) -> str:
        """The status item, once it says one of these."""

        def look() -> str:
            text = self.status()
            return text if any(word in text for word in words) else ""

        try:
            return str(wait_until(look, "the status", timeout))
        except AssertionError:
            message = f"not within {timeout:.0f} s: {words} in the status {self.status()!r}"
            raise AssertionError(message) from None

    def menu(self) -> list[str]:
        """Open the menu of the status item; return its entries."""
        self.click(_STATUS + " a")
        title = _PICK + " .quick-input-title"
        wait_until(lambda: any("fimserver" in text for text in self.texts(title)), "the menu is there")
        rows = json.dumps(".quick-input-list .monaco-list-row")
        code = f"[...document.querySelectorAll({rows})].map(row => row.ariaLabel)"
        found: list[str] = wait_until(lambda: self.evaluate(code), "its entries are there")
        return found

    def choose(self, label: str) -> None:
        """Choose from an open menu."""
        wait_until(lambda: self.has(_TYPED), "the menu is there")
        self.type(label)
        wait_until(lambda: any(label in text for text in self.texts(_CHOSEN)), f"{label} is found")
        self.press("Enter")

    def choose_path(self, path: Path, button: str) -> None:
        """Give a path to a dialog for files, and press its button."""
        typed = f"{path}/" if path.is_dir() else str(path)
        shown = f"document.querySelector({json.dumps(_PICK + ' input')}).value"
        wait_until(lambda: self.has(_PICK + " .quick-input-action .monaco-button"), "the dialog is there")
        for _ in range(3):  # while it lists a folder it takes keys for something else
            wait_until(self.rows, "the folder is listed")
            self.press("Control+a")
            self.type(typed)
            with suppress(AssertionError):
                wait_until(lambda: self.evaluate(shown) == typed, "the path is typed", 3)
                break
        for _ in range(10):
            self.click(f"{_PICK} .quick-input-action .monaco-button >> text={button}")
            with suppress(AssertionError):
                wait_until(lambda: not self.has(_PICK), "the dialog is gone", 3)
                return
        message = f"the dialog does not take {typed}"
        raise AssertionError(message)

    def notifications(self) -> list[str]:
        """Messages that are on the screen."""
        return self.texts(".notification-toast .notification-list-item-message")

    @contextmanager
    def asks_again(self) -> Iterator[None]:
        """Wait until the message on the screen is replaced by one of the same text, which VS Code closes first."""
        self.evaluate("document.querySelector('.notification-toast').dataset.earlier = ''")
        yield
        again = ".notification-toast:not([data-earlier]) .notification-list-item-message"
        wait_until(lambda: len(self.texts(again)) == len(self.notifications()) == 1, "the question, asked again")

    def dismiss(self) -> None:
        """Take all messages off the screen."""
        self.press("Escape")
        self.command("Notifications: Clear All Notifications")
        wait_until(lambda: not self.notifications(), "no message is on the screen")

    def accept(self, text: str) -> None:
        """Accept the first entry of a list, once it offers a text and has the focus."""
        wait_until(lambda: any(text in row for row in self.rows()), f"{text} is offered")
        wait_until(lambda: self.has(_TYPED) and self.has(_CHOSEN), f"the list with {text} has the keys")
        self.press("Enter")

    def rows(self) -> list[str]:
        """What a list to choose from offers."""
        return self.texts(_PICK + " .quick-input-list .monaco-list-row")

    def background(self) -> str:
        """The window's colour."""
        return str(self.evaluate("getComputedStyle(document.querySelector('.monaco-workbench')).backgroundColor"))

    def close_editors(self) -> None:
        """Save what is open and close it."""
        self.press("Escape")
        self.command("File: Save All")
        wait_until(lambda: not self.has(".tab.dirty"), "all is saved")
        self.command("View: Close All Editors")
        wait_until(lambda: not self.has(".tabs-container .tab"), "all is closed")

    def close(self) -> None:
        """Close the page."""
        self._browser.do("close", page=self._page)


def _differs(look: Callable[[], str], before: str) -> bool:
    return look() != before


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Workbench:
    """One code-server with the extension; ``close`` ends it and all of its windows."""

    def __init__(
        self,
        vscode: VSCode,
        vsix: Path,
        folder: Path,
        *,
        env: dict[str, str],
        settings: dict[str, Any] | None = None,
        trusted: bool = True,
        other: Path | None = None,
    ) -> None:
        """Open ``folder`` with the user's ``settings`` over quiet ones; ``other`` is one more extension."""
        self.folder = folder
        self.data = Path(tempfile.mkdtemp(prefix="code-"))
        self._settings = {**_QUIET, "fimserver.serverPath": str(FIMSERVER), **(settings or {})}
        self._write_settings()
        places: list[str | Path] = ["--user-data-dir", self.data, "--extensions-dir", self.data / "extensions"]
        self._command: list[str | Path] = [vscode.node, vscode.code_server, *places]
        # Started as if from a command line, its extensions get the environment as it is here, not a login shell's.
        variables = {**os.environ, **env, "VSCODE_CLI": "1", "XDG_CONFIG_HOME": str(self.data / "config")}
        for name in ("VSCODE_IPC_HOOK_CLI", "PASSWORD"):
            variables.pop(name, None)
        for extension in filter(None, (vsix, other)):
            run(*self._command, "--install-extension", extension, env=variables)
        options = ["--auth", "none", "--disable-telemetry", "--disable-update-check"]
        if trusted:
            options.append("--disable-workspace-trust")
        self._browser: Browser | None = None
        self._serve(options, variables)
        try:
            wait_until(lambda: self._is_served(options, variables), "code-server answers", 90)
            self._browser = Browser(vscode)
        except BaseException:
            self.close()
            raise

    def _serve(self, options: list[str], variables: dict[str, str]) -> None:
        """Start it at a free port."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [*self._command, *options, "--bind-addr", f"127.0.0.1:{port}"]
        with (self.data / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)

    def _is_served(self, options: list[str], variables: dict[str, str]) -> bool:
        """Whether it answers; it is started again where it has ended: another program can have taken the port."""
        if self._process.poll() is not None:
            self._serve(options, variables)
        return self._answers()

    @property
    def pid(self) -> int:
        """Its process, which all others are below."""
        return self._process.pid

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:  # noqa: S310  our own
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def window(self, width: int = 1000, height: int = 640, *, workspace: Path | None = None) -> Window:
        """Another window on the folder, or on the folders of a workspace file."""
        assert self._browser is not None
        query = f"folder={self.folder}" if workspace is None else f"workspace={workspace}"
        return Window(self._browser, f"{self.url}/?{query}", width, height)

    def write(self, name: str, text: str = SAMPLE) -> Path:
        """A file in the folder."""
        file = self.folder / name
        file.write_bytes(text.encode())
        return file

    def in_themes(self, window: Window, picture: Callable[[str], None]) -> None:
        """Show a window in each theme, light at first and in the end; ``picture`` gets the theme's short name."""
        picture("light")
        for name in ("dark", "contrast", "light"):
            is_new = partial(_differs, window.background, window.background())
            self.repeat_until(partial(self.set_any, "workbench.colorTheme", THEMES[name]), is_new, THEMES[name])
            if name != "light":
                picture(name)

    @contextmanager
    def stubbed(self, window: Window, stub: Stub) -> Iterator[None]:
        """The stub server in the place of the model, for a while."""
        started = partial(stub.received, "initialized")
        self.set_until(started, "the stub has started", serverPath=str(stub_program(stub)))
        window.wait_for_status("Ready", "loading")
        try:
            yield
        finally:
            self.set_for_status(window, "tiny", serverPath=str(FIMSERVER))

    def assert_calm(self, window: Window) -> None:
        """Check that no complaint was logged or shown."""
        assert window.notifications() == []
        assert self.host_errors() == []
        errors = [line for line in self.logs().splitlines() if "[error]" in line]
        assert [line for line in errors if not re.search("SIGKILL|connection was closed", line)] == []

    def set(self, **settings: Any) -> None:
        """Change the user's settings, in their file; names without ``fimserver.``, ``None`` removes one."""
        for name, value in settings.items():
            self.set_any(f"fimserver.{name}", value)

    def set_until(self, is_so: Callable[[], Any], what: str, **settings: Any) -> None:
        """Set, and repeat until a condition is true."""
        self.repeat_until(partial(self.set, **settings), is_so, what)

    def set_for_status(self, window: Window, word: str, **settings: Any) -> None:
        """Set, until a window's status item has a word."""
        self.set_until(lambda: word in window.status(), f"{word} in the status", **settings)

    @staticmethod
    def repeat_until(change: Callable[[], None], is_so: Callable[[], Any], what: str) -> None:
        """Repeat a change of settings: VS Code misses it while its watchers restart, for another folder say."""
        for _ in range(3):
            change()
            with suppress(AssertionError):
                wait_until(is_so, what)
                return
        message = f"not after three changes of the settings: {what}"
        raise AssertionError(message)

    def set_any(self, name: str, value: Any) -> None:
        """Change one of the user's settings by its full name."""
        self._settings[name] = value
        if value is None:
            del self._settings[name]
        self._write_settings()

    def _write_settings(self) -> None:
        for name in ("User", "Machine"):  # what belongs to a machine is read from the second alone
            file = self.data / name / "settings.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_over(file, json.dumps(self._settings, indent=2).encode())

    def settings(self) -> dict[str, Any]:
        """Return the user's settings as the file has them now."""
        return read_settings(self.data / "User" / "settings.json")

    def logs(self) -> str:
        """The extension's own log, of all windows."""
        return "".join(file.read_text(encoding="utf-8") for file in sorted(self.data.rglob("*fimserver*.log")))

    def host_errors(self) -> list[str]:
        """Lines of the extension hosts' logs that blame this extension."""
        logs = (file.read_text(encoding="utf-8") for file in self.data.rglob("remoteexthost.log"))
        lines = (line for log in logs for line in log.splitlines())
        return [line for line in lines if "[error]" in line and "fimserver" in line]

    def close(self) -> None:
        """End it."""
        if self._browser is not None:
            self._browser.close()
        try:
            os.killpg(self._process.pid, 15)
            self._process.wait(20)
        except ProcessLookupError:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        shutil.rmtree(self.data, ignore_errors=True)


def write_over(file: Path, data: bytes) -> None:
    """Write a file of settings so that it is whole at every moment: an empty one restarts the server, without a path.

    A rename would do that too, but VS Code misses some.
    """
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0) as opened:
        opened.write(data.ljust(os.fstat(opened.fileno()).st_size))


def read_settings(file: Path) -> dict[str, Any]:
    """What a file of settings holds, once it is whole: VS Code writes it in place, empty at first."""

    def read() -> tuple[dict[str, Any]] | None:
        with suppress(json.JSONDecodeError):
            return (json.loads(file.read_text(encoding="utf-8")),)
        return None

    (found,) = wait_until(read, f"{file} is JSON")
    assert isinstance(found, dict)
    return found


def stub_program(stub: Stub) -> Path:
    """A program that starts it as ``fimserver`` is started."""
    return write_script(stub.rules.with_name("stub"), f"exec {shlex.join(stub.command)}")


_WATCH = """(() => {
  const ghost = () => %s;
  window.fimWatch = { began: 0, took: null };
  const look = () => {
    const watch = window.fimWatch;
    if (watch.began && watch.took === null && ghost()) watch.took = performance.now() - watch.began;
  };
  new MutationObserver(() => requestAnimationFrame(look))
    .observe(document.body, { subtree: true, childList: true, characterData: true });
  document.addEventListener('keydown', () => { window.fimWatch = { began: performance.now(), took: null }; }, true);
})()"""


def measure(window: Window, file: Path, num_pauses: int) -> list[float]:
    """Milliseconds from the last key of a line to the frame that has ghost text, where some came."""
    taken: list[float] = []
    window.open(file)
    window.evaluate(_WATCH % _GHOST)
    for text in LINES[:num_pauses]:
        window.go(19)
        window.press("End", "Enter")
        window.type(text[:-1])
        time.sleep(0.7)  # an answer to the text before the last key is not measured
        window.press("Escape")
        window.type(text[-1])
        with suppress(AssertionError):
            taken.append(float(wait_until(lambda: window.evaluate("window.fimWatch.took"), "ghost text", 3)))
        window.press("Escape", "Control+Shift+K")
    return sorted(taken)


def report_latency(num_pauses: int = 40) -> None:
    """Print key to ghost text, for the shipped model and for a stub."""
    vscode = find_vscode()
    with fimserver_home() as env, tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = folder / "inventory.py"
        shutil.copy(SAMPLE_FILE, file)
        stub = Stub(folder, {"after": "", "texts": ["stub_value"]})
        workbench = Workbench(vscode, package(folder), folder, env=env)
        try:
            window = workbench.window()
            for name, program in (("tiny", FIMSERVER), ("stub", stub_program(stub))):
                workbench.set(serverPath=str(program))
                window.wait_for_status("tiny" if name == "tiny" else "Ready", timeout=120)
                if name == "stub":
                    wait_until(lambda: stub.received("initialized"), "the stub has started")
                taken = measure(window, file, num_pauses)
                print_latency(f"VS Code, {name}", taken, num_pauses, env if name == "tiny" else None)
        finally:
            workbench.close()


def open_workbench(folder: Path) -> None:
    """Serve a workbench until a key is pressed."""
    with tempfile.TemporaryDirectory() as place:
        workbench = Workbench(find_vscode(), package(Path(place)), folder.resolve(), env={})
        try:
            input(f"{workbench.url}/?folder={folder.resolve()} (Enter ends it) ")
        finally:
            workbench.close()


def main(arguments: list[str]) -> None:
    """Run a sub-command."""
    match arguments:
        case ["latency"]:
            report_latency()
        case ["open", folder]:
            open_workbench(Path(folder))
        case _:
            print(__doc__)
