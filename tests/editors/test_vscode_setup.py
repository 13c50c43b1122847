"""The VS Code extension in workbenches that are set up for one thing: trust, installing, several folders, a Vim."""

import json
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from support import vscode as editor
from support.real_editors import BEGUN, FIMSERVER, LINE, SAMPLE, Stub, wait_until, write_script
from support.vscode import VSCode, Window, Workbench, stub_program

editors = pytest.mark.editors


@editors
def test_a_workspace_that_is_not_trusted(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    folder = tmp_path / "theirs"
    (folder / ".vscode").mkdir(parents=True)
    traces = tmp_path / "traces"
    evil = write_script(tmp_path / "evil.sh", f"touch {traces}")
    for name in (".venv", "venv"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "fimserver").symlink_to(evil)
    settings = {"fimserver.serverPath": str(evil), "fimserver.model": "/theirs", "fimserver.device": "cuda:7"}
    (folder / ".vscode" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    with closing(Workbench(vscode, vsix, folder, env=editors_home, trusted=False)) as workbench:
        window = workbench.window()
        status = window.wait_for_status("Ready", timeout=120)
        assert "tiny, on cpu" in status
        assert "not trusted" in status
        assert window.begin(folder / "inventory.py")
        window.screenshot(pictures / "untrusted.png")
        assert not traces.exists()
        workbench.assert_calm(window)


@editors
def test_nothing_of_a_hostile_repository_runs(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path
) -> None:
    folder, ran, seen = tmp_path / "theirs", tmp_path / "ran", tmp_path / "seen"
    for place in (folder, folder / "bin"):
        for name in ("fimserver", "uv", "pipx", "python3", "python"):
            write_script(place / name, f'echo "$0" >> {ran}')
    for name in ("venv", "ensurepip"):
        (folder / f"{name}.py").write_text(f"open('{ran}', 'a').write('{name}')\n", encoding="utf-8")
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    link = tmp_path / "link" / "fimserver"
    link.parent.mkdir()
    link.symlink_to(folder / "fimserver")
    safe = write_script(tmp_path / "tools" / "fimserver", f'echo "$PWD|$PATH" >> {seen}', f'exec {FIMSERVER} "$@"')
    end = f"{safe.parent}:/usr/bin:/bin"
    env = {**editors_home, "PATH": f"{folder}:{folder}/bin:{link.parent}:.::bin:{end}", "PYTHONPATH": str(folder)}
    settings = {"fimserver.serverPath": ""}
    with closing(Workbench(vscode, vsix, folder, env=env, settings=settings, trusted=False)) as workbench:
        window = workbench.window()
        assert "not trusted" in window.wait_for_status("Ready", timeout=120)
        cwd, path = seen.read_text(encoding="utf-8").splitlines()[0].split("|")
        assert not Path(cwd).is_relative_to(folder)
        assert str(folder) not in path
        assert path.endswith(end)
        window.command("fimserver: Install the Server")
        (question,) = wait_until(window.notifications, "the question")
        assert str(folder) not in question
        assert not ran.exists(), ran.read_text(encoding="utf-8")
        window.dismiss()
        workbench.assert_calm(window)


@editors
@pytest.mark.parametrize("has_own", [False, True], ids=["by_path", "with_an_environment"])
def test_trust_is_given_while_it_runs(
    has_own: bool, vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path
) -> None:
    folder, journal = tmp_path / "project", tmp_path / "journal"
    on_path, in_folder = tmp_path / "bin" / "fimserver", folder / ".venv" / "bin" / "fimserver"
    folder.mkdir()
    for program in [on_path, in_folder] if has_own else [on_path]:
        write_script(program, f'echo "$0" >> {journal}', f'exec {FIMSERVER} "$@"')
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    env = {**editors_home, "PATH": f"{on_path.parent}:/usr/bin:/bin"}
    with closing(
        Workbench(vscode, vsix, folder, env=env, settings={"fimserver.serverPath": ""}, trusted=False)
    ) as workbench:
        window = workbench.window()
        assert "not trusted" in window.wait_for_status("Ready", timeout=120)
        started = [str(on_path)]
        assert journal.read_text(encoding="utf-8").split() == started
        window.command("Workspaces: Manage Workspace Trust")
        window.click(".workspace-trust-editor .monaco-button >> text=Trust")
        if has_own:
            started.append(str(in_folder))
            wait_until(lambda: journal.read_text(encoding="utf-8").split() == started, "the workspace's program runs")
        status = wait_until(
            lambda: "Ready" in (text := window.status()) and "not trusted" not in text and text, "trust"
        )
        assert "tiny, on cpu" in status
        window.begin(folder / "inventory.py")
        assert journal.read_text(encoding="utf-8").split() == started, "nothing is started again without a reason"
        workbench.assert_calm(window)


@editors
def test_several_folders(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        folder.mkdir()
        (folder / f"{folder.name}.py").write_text(SAMPLE, encoding="utf-8")
    workspace = tmp_path / "both.code-workspace"

    def write_workspace(*names: str) -> None:
        workspace.write_text(json.dumps({"folders": [{"path": name} for name in names]}), encoding="utf-8")

    write_workspace("first", "second")
    stub = Stub(tmp_path, {"after": "self.items.app", "texts": ["end(one)"]})
    settings = {"fimserver.serverPath": str(stub_program(stub))}
    with closing(Workbench(vscode, vsix, folders[0], env=editors_home, settings=settings)) as workbench:
        window = workbench.window(workspace=workspace)
        window.wait_for_status("Ready", timeout=120)
        sent = stub.received("initialize")[0]["workspaceFolders"]
        assert [folder["name"] for folder in sent] == ["first", "second"]
        sent_more = partial(stub.received, "workspace/didChangeWorkspaceFolders")
        workbench.repeat_until(
            partial(write_workspace, "first", "second", "third"), sent_more, "the server got the command"
        )
        added = sent_more()
        assert [folder["name"] for folder in added[0]["event"]["added"]] == ["third"]
        workbench.set_for_status(window, "tiny", serverPath=str(FIMSERVER))
        for folder in folders:
            assert window.begin(folder / f"{folder.name}.py")
        window.screenshot(pictures / "folders.png")
        workbench.assert_calm(window)


VIM = {
    "name": "modes",
    "publisher": "tests",
    "version": "0.0.1",
    "engines": {"vscode": "^1.96.0"},
    "activationEvents": ["*"],
    "main": "./extension.js",
    "contributes": {
        "keybindings": [
            {"key": "escape", "command": "modes.normal", "when": "editorTextFocus"},
            {"key": "tab", "command": "modes.tab", "when": "editorFocus && modes.mode != 'insert'"},
        ]
    },
}
VIM_CODE = """
// Stands in for the Vim extension (VSCodeVim): it takes "type" and Escape the same way, and Tab outside of inserting.
const { commands, window } = require("vscode");
const shown = window.createStatusBarItem("modes.mode");
let mode;
async function enter(name) {
  mode = name;
  await commands.executeCommand("setContext", "modes.mode", name);
  shown.text = `-- ${name.toUpperCase()} --`;
}
exports.activate = () => {
  shown.show();
  enter("normal");
  commands.registerCommand("type", (typed) => {
    if (mode === "insert") return commands.executeCommand("default:type", typed);
    if (typed.text === "A") {
      enter("insert"); // at once: the next key may be under way
      return commands.executeCommand("cursorEnd");
    }
  });
  commands.registerCommand("modes.normal", () => {
    const was = mode;
    enter("normal");
    return was === "insert" ? commands.executeCommand("cursorLeft") : undefined;
  });
  commands.registerCommand("modes.tab", () => undefined);
};
"""


def leave_inserting(window: Window) -> None:
    """Press Escape, and wait for the mode: its step to the left would move the cursor of whatever comes next."""
    window.press("Escape")
    wait_until(lambda: any("NORMAL" in text for text in window.texts(".statusbar-item")), "the mode")


@editors
def test_next_to_an_extension_with_modes(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    source, folder = tmp_path / "modes", tmp_path / "project"
    source.mkdir()
    folder.mkdir()
    (source / "package.json").write_text(json.dumps(VIM), encoding="utf-8")
    (source / "extension.js").write_text(VIM_CODE, encoding="utf-8")
    modes = editor.pack(source, tmp_path / "modes.vsix")
    file = folder / "inventory.py"
    file.write_text(SAMPLE, encoding="utf-8")
    with closing(Workbench(vscode, vsix, folder, env=editors_home, other=modes)) as workbench:
        window = workbench.window()
        window.wait_for_status("Ready", timeout=120)
        window.open(file)
        window.go(LINE)
        window.type("pppp")  # keys of a mode that inserts nothing
        window.type("A")
        ghost = window.type_until_ghost("p")
        window.take_ghost()
        window.type("  # ")
        leave_inserting(window)
        window.press("Tab")
        window.type("Aso")
        wait_until(lambda: any(line.endswith("# so") for line in window.written()), "all has been through the modes")
        assert window.save(file).decode().splitlines()[LINE - 1] == f"{BEGUN}{ghost}  # so"
        leave_inserting(window)
        window.go(LINE + 1)
        window.type("A")
        window.type(")\nself.items.ap")
        window.type_until_ghost("p")
        window.press("Escape")  # leaves the mode, and takes the ghost text away with it
        wait_until(lambda: not window.ghost(), "the ghost text is gone")
        window.screenshot(pictures / "modes.png")
        assert workbench.host_errors() == []


@editors
def test_pictures_of_first_steps_and_errors(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    missing = tmp_path / "no" / "fimserver"
    with closing(
        Workbench(vscode, vsix, tmp_path, env=editors_home, settings={"fimserver.serverPath": str(missing)})
    ) as workbench:
        window = workbench.window(width=1500, height=800)  # wide enough for the steps' pictures
        window.wait_for_status("No completions", timeout=120)
        shown = wait_until(window.notifications, "what is wrong")
        assert len(shown) == 1
        assert str(missing) in shown[0]
        workbench.in_themes(window, lambda theme: window.screenshot(pictures / f"error_{theme}.png"))
        window.menu()
        window.screenshot(pictures / "error_menu.png")
        window.press("Escape")
        window.dismiss()
        window.command("Welcome: Open Walkthrough")
        window.choose("Code completion on your own machine")
        for number, step in enumerate(("Install the server", "Type, and press Tab", "The menu in the status bar"), 1):
            window.click(f".getting-started-step >> text={step}")
            time.sleep(2)  # for the text next to it, in a frame
            workbench.in_themes(window, partial(picture_step, window, pictures, number))
        workbench.set_for_status(window, "Ready", serverPath=str(FIMSERVER))
        assert window.notifications() == []


def picture_step(window: Window, pictures: Path, number: int, theme: str) -> None:
    window.screenshot(pictures / f"walkthrough{number}_{theme}.png")


FAKE_UV = """\
echo "$@" >> {journal}
case "$1" in
  venv) mkdir -p "$4/bin" ;;
  pip)
    case "$*" in
      *torch==*) echo "Downloading torch (175.2MiB)"; {torch} ;;
      *) cp {server} "$(dirname "$4")/fimserver" ;;
    esac ;;
esac
"""
OFFLINE = 'echo "  Caused by: dns error: failed to lookup https://download.pytorch.org/whl/cpu" >&2; exit 2'


@editors
def test_from_the_package_alone_to_ghost_text(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    """As a new user: the question is left alone at first, and everything else works meanwhile."""
    folder, tools, journal = tmp_path / "project", tmp_path / "tools", tmp_path / "journal"
    folder.mkdir()
    (folder / "inventory.py").write_text(SAMPLE, encoding="utf-8")
    server = write_script(tmp_path / "server", f'exec {FIMSERVER} "$@"')

    def write_uv(torch: str) -> None:
        write_script(tools / "uv", FAKE_UV.format(journal=journal, torch=torch, server=server))

    write_uv("exec sleep 600")
    env = {**editors_home, "PATH": f"{tools}:/usr/bin:/bin"}
    with closing(Workbench(vscode, vsix, folder, env=env, settings={"fimserver.serverPath": ""})) as workbench:
        window = workbench.window()
        window.wait_for_status("not installed", timeout=120)
        (question,) = wait_until(window.notifications, "the question")
        assert question.startswith("Install the completion server? It downloads 0.3 GB.")
        workbench.in_themes(window, lambda theme: window.screenshot(pictures / f"install_{theme}.png"))
        click_everything(window)
        assert window.notifications() == [question], "the question is still there"
        assert not journal.exists(), "nothing is downloaded before the answer"

        window.click(".notification-toast .monaco-button >> text=Install")
        wait_until(lambda: any("torch, 175.2 MB" in text for text in window.notifications()), "how far it is")
        window.screenshot(pictures / "installing.png")
        window.click(".notification-toast .monaco-button >> text=Cancel")
        wait_until(lambda: not window.notifications(), "it was stopped")
        assert "not installed" in window.status()
        place = "globalStorage/fimserver.fimserver/server"
        wait_until(lambda: not list(workbench.data.rglob(place)), "what was begun is gone")

        write_uv(OFFLINE)
        window.menu()
        window.choose("Install the server")
        click_install(window)
        wait_until(lambda: any("does not find" in text for text in window.notifications()), "what is wrong")
        assert any("download.pytorch.org" in text for text in window.notifications())
        window.screenshot(pictures / "offline.png")

        write_uv("true")
        window.click(".notification-toast .monaco-button >> text=Install")
        click_install(window)
        window.wait_for_status("Ready", timeout=60)
        wait_until(lambda: any(text.startswith("Ready:") for text in window.notifications()), "what to do next")
        window.click(".notification-toast .monaco-button >> text=Open a Sample")
        assert window.wait_for_ghost().startswith("pend(")
        window.screenshot(pictures / "sample.png")
        assert journal.read_text(encoding="utf-8").splitlines()[-1].endswith("fimserver-0.1.0-py3-none-any.whl")
        assert workbench.host_errors() == []


def click_install(window: Window) -> None:
    """Answer the question."""
    wait_until(lambda: any(text.startswith("Install the") for text in window.notifications()), "the question")
    window.click(".notification-toast .monaco-button >> text=Install")


def click_everything(window: Window) -> None:
    """Use the status item, the palette and the walkthrough while a question is on the screen."""
    assert any("Install the server" in row for row in window.menu())
    window.press("Escape")
    window.command("fimserver: Open the Log")
    wait_until(lambda: window.has(".panel .view-line"), "the log is there")
    window.command("View: Hide Panel")
    window.command("fimserver: Settings")
    wait_until(lambda: window.has(".settings-editor .setting-item-contents"), "the settings are there")
    window.press("Escape")
    wait_until(lambda: not window.has(".settings-editor"), "they are closed")
    window.command("Welcome: Open Walkthrough")
    window.choose("Code completion on your own machine")
    window.click(".getting-started-step >> text=Install the server")
    with window.asks_again():
        window.click(".getting-started-step .monaco-button >> text=Install the server")


@editors
def test_a_server_that_cannot_start(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    lines = ("Traceback ...", "ModuleNotFoundError: No module named 'torch'")
    broken = write_script(tmp_path / "broken", *(f'echo "{line}" >&2' for line in lines), "exit 1")
    settings = {"fimserver.serverPath": str(broken)}
    with closing(Workbench(vscode, vsix, tmp_path, env=editors_home, settings=settings)) as workbench:
        window = workbench.window()
        window.wait_for_status("No completions", timeout=120)
        (shown,) = wait_until(window.notifications, "what is wrong")
        assert shown.startswith("The server does not start: No module named 'torch'.")
        assert window.texts(".notification-toast .monaco-button") == ["Doctor", "Install", "Open Log"]
        workbench.in_themes(window, lambda theme: window.screenshot(pictures / f"broken_{theme}.png"))
        time.sleep(1)  # nothing shows that no other message comes
        assert len(window.notifications()) == 1
        window.command("fimserver: Why Was There No Completion?")
        wait_until(lambda: len(window.notifications()) == 2, "why")
        workbench.set_for_status(window, "Ready", serverPath=str(FIMSERVER))


@editors
def test_whose_setting_a_model_is(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    settings = folder / ".vscode" / "settings.json"
    with closing(Workbench(vscode, vsix, folder, env=editors_home, settings={"fimserver.model": "/mine"})) as workbench:
        window = workbench.window()
        window.wait_for_status("No completions", timeout=120)
        (shown,) = wait_until(window.notifications, "there is no such model")
        assert "/mine" in shown, "the user's own setting is tried without a question"
        assert "Load the model" not in shown
        window.dismiss()
        workbench.set_for_status(window, "Ready", model=None)

        def theirs(model: str | None) -> None:
            settings.parent.mkdir(exist_ok=True)
            editor.write_over(settings, json.dumps({} if model is None else {"fimserver.model": model}).encode())

        status = partial(window.status)
        workbench.repeat_until(partial(theirs, "/theirs"), lambda: "not allowed" in status(), "the warning")
        (question,) = wait_until(window.notifications, "the question")
        assert question.startswith("Load the model /theirs?")
        workbench.in_themes(window, lambda theme: window.screenshot(pictures / f"question_{theme}.png"))
        window.press("Escape")
        window.dismiss()
        assert "not allowed" in window.status(), "the warning stays"
        window.menu()
        window.choose("Allow or refuse")
        wait_until(lambda: any("Load the model /theirs?" in text for text in window.notifications()), "asked again")
        window.dismiss()
        workbench.repeat_until(partial(theirs, None), lambda: "Ready" in status(), "without the setting")


@editors
def test_a_model_is_chosen_in_the_terminal(
    vscode: VSCode, vsix: Path, editors_home: dict[str, str], tmp_path: Path, pictures: Path
) -> None:
    started = tmp_path / "started"
    lines = [f'if [ "$1" = lsp ]; then echo started >> {started}; fi', f'exec {FIMSERVER} "$@"']
    asks = 'if [ "$1" = setup ]; then echo "Which model?"; read answer; echo "chosen: $answer"; exit 0; fi'
    program = write_script(tmp_path / "tools" / "fimserver", asks, *lines)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "main.go").write_text("package main\n", encoding="utf-8")
    settings = {"fimserver.serverPath": str(program)}
    with closing(Workbench(vscode, vsix, folder, env=editors_home, settings=settings)) as workbench:
        window = workbench.window()
        window.wait_for_status("Ready", timeout=120)
        window.open(folder / "main.go")
        window.wait_for_status("Python only")
        window.click(".notification-toast .monaco-button >> text=Get a Model")
        terminal = ".xterm-rows"
        wait_until(lambda: any("Which model?" in text for text in window.texts(terminal)), "the command asks")
        wait_until(lambda: window.has(".xterm.focus"), "the terminal has the keys")
        window.screenshot(pictures / "setup.png")
        window.type("the first")
        window.press("Enter")
        wait_until(lambda: any("chosen: the first" in text for text in window.texts(terminal)), "it got the answer")
        wait_until(
            lambda: started.read_text(encoding="utf-8").count("started") == 2, "the server starts with the choice"
        )
        window.wait_for_status("Python only")
        assert workbench.host_errors() == []
