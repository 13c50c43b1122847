"""The server as an editor meets it: raw frames over stdio, and the shipped model."""

import contextlib
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeServer
from support.lsp_client import SERVER, LspClient, has_memory
from support.rights import without_rights

from fimserver.context.privacy.ignored import is_writable

URI = "file:///home/me/app.py"
TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return fi\n\n\ndef main():\n    pass\n"
LINE, COLUMN = 5, 17


@pytest.fixture(scope="module")
def ready() -> Iterator[LspClient]:
    """One server with its model loaded, shared by the tests that leave it as it was."""
    client = LspClient()
    client.initialize(options={"seed": 0, "debounceMs": 0})
    client.wait_until_ready()
    yield client
    client.close()


@pytest.fixture
def fresh() -> Iterator[LspClient]:
    client = LspClient()
    yield client
    client.close()


def worked_s(client: LspClient) -> float:
    """Return the processor time of a server, which other programs do not change; wall time where it is unknown."""
    if sys.platform != "linux":
        return time.perf_counter()
    fields = Path(f"/proc/{client.process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def stopped(client: LspClient) -> Iterator[None]:
    """Stop the engine: it neither answers nor ends loading, however fast it is."""
    deadline = time.monotonic() + 30
    while (pid := client.explain()["engine"]["pid"]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(["kill", "-STOP", str(pid)], check=True)
    try:
        yield
    finally:
        subprocess.run(["kill", "-CONT", str(pid)], check=False, stderr=subprocess.DEVNULL)


def test_initialize_is_quick_and_before_the_model(fresh: LspClient) -> None:
    begin = 0.0 if sys.platform == "linux" else time.perf_counter()
    result = fresh.initialize()
    assert worked_s(fresh) - begin < 1.5
    capabilities = result["capabilities"]
    assert capabilities["inlineCompletionProvider"] is not None
    assert capabilities["textDocumentSync"]["change"] == 2
    assert capabilities["positionEncoding"] == "utf-16"
    assert not any(n["method"] == "didChangeStatus" and not n["params"]["busy"] for n in fresh.notifications)


@pytest.mark.slow("starts a server with the shipped model")
def test_item_has_text_range_and_command(ready: LspClient) -> None:
    ready.open(URI, TEXT)
    item, *_ = ready.complete(URI, LINE, COLUMN)
    assert item["insertText"].strip()
    assert "\n" not in item["insertText"]
    place = {"line": LINE, "character": COLUMN}
    assert item["range"] == {"start": place, "end": place}
    assert item["command"]["command"] == "fimserver.didAcceptCompletion"
    before = ready.explain()["counters"].get("accepted", 0)
    ready.request("workspace/executeCommand", item["command"])
    assert ready.explain()["counters"]["accepted"] == before + 1


@pytest.mark.slow("starts a server with the shipped model")
@pytest.mark.parametrize(("encoding", "column"), [("utf-8", 22), ("utf-16", 20), ("utf-32", 19)])
def test_encodings_after_emoji(fresh: LspClient, encoding: str, column: int) -> None:
    result = fresh.initialize(encodings=[encoding], options={"seed": 0})
    assert result["capabilities"]["positionEncoding"] == encoding
    fresh.open(URI, TEXT.replace("file:\n", "file:  #\n"))
    # An edit after an emoji: the line becomes  return ("🐍", fi  and the like, whichever the model can finish.
    start = '        return ("\U0001f40d", '
    offered = []
    for version, name in enumerate(["fi", "pat", "os.pa", "file.re", "len(pa"], 2):
        end = 17 if version == 2 else 999
        fresh.change(URI, 2 * version, edit(5, 0, 5, end, start + name))
        fresh.change(URI, 2 * version + 1, edit(5, column, 5, column + 2, ", "))
        line = start + name
        units = {"utf-8": len(line.encode()), "utf-16": len(line) + 1, "utf-32": len(line)}[encoding]
        for item in fresh.complete(URI, 5, units):
            offered.append(item)
            assert item["range"]["start"] == {"line": 5, "character": units}
    assert offered
    inside = {"utf-8": 18, "utf-16": 18}.get(encoding)
    if inside is not None:  # the second unit of the emoji
        answer = fresh.wait(fresh.send_completion(URI, 5, inside))
        assert "inside a character" in answer["error"]["message"]


def edit(start_line: int, start: int, end_line: int, end: int, text: str) -> dict[str, object]:
    span = {"start": {"line": start_line, "character": start}, "end": {"line": end_line, "character": end}}
    return {"range": span, "text": text}


@pytest.mark.slow("starts a server with the shipped model")
def test_cancelled_request_is_answered_at_once(fresh: LspClient) -> None:
    """The answer does not wait for a step of the engine, which continues with the next request."""
    fresh.initialize(options=SLOW)
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    with stopped(fresh):
        request = fresh.send_completion(URI, LINE, COLUMN)
        time.sleep(0.1)
        fresh.notify("$/cancelRequest", {"id": request})
        assert fresh.wait(request, 5)["error"]["code"] == -32800
        assert fresh.explain()["last"]["reason"] == "cancelled"
    assert fresh.complete(URI, LINE, COLUMN)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"textDocument": {"uri": URI}, "position": {"line": 0, "character": 0}}, "context"),
        ({"position": {"line": 0, "character": 0}, "context": {"triggerKind": 1}}, "textDocument"),
        (
            {"textDocument": {"uri": 7}, "position": {"line": 0, "character": 0}, "context": {"triggerKind": 1}},
            "not open",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": "a", "character": 0}, "context": {"triggerKind": 1}},
            "line",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 0}, "context": {"triggerKind": 9}},
            "trigger",
        ),
        (
            {
                "textDocument": {"uri": "file:///no"},
                "position": {"line": 0, "character": 0},
                "context": {"triggerKind": 1},
            },
            "not open",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": 999, "character": 0}, "context": {"triggerKind": 1}},
            "outside",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": 0.5, "character": 0}, "context": {"triggerKind": 1}},
            "line",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": 0, "character": "3"}, "context": {"triggerKind": 1}},
            "character",
        ),
        (
            {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 0}, "context": {"triggerKind": True}},
            "triggerKind",
        ),
        (None, "textDocument"),
        ([], ""),
    ],
)
def test_bad_parameters_get_an_error(ready: LspClient, params: object, message: str) -> None:
    ready.open(URI, TEXT)
    answer = ready.wait(ready.send("textDocument/inlineCompletion", params), 5)
    assert answer["error"]["code"] == -32602
    assert message.lower() in answer["error"]["message"].lower()
    assert "return fi" not in answer["error"]["message"]
    assert ready.complete(URI, LINE, COLUMN), "the server still answers"


@pytest.mark.slow("starts a server with the shipped model")
def test_requests_outside_the_session_are_refused(fresh: LspClient) -> None:
    early = fresh.wait(fresh.send_completion(URI, 0, 0))
    assert early["error"]["code"] == -32002
    fresh.initialize()
    fresh.request("shutdown", None)
    late = fresh.wait(fresh.send_completion(URI, 0, 0))
    assert late["error"]["code"] == -32600
    fresh.notify("exit", None)
    assert fresh.process.wait(10) == 0


@pytest.mark.slow("starts a server with the shipped model")
def test_unknown_method_and_broken_json_leave_the_server_alive(fresh: LspClient) -> None:
    fresh.initialize()
    unknown = fresh.wait(fresh.send("textDocument/noSuchThing", {}))
    assert unknown["error"]["code"] == -32601
    fresh.write(b'Content-Length: 9\r\n\r\n{"broken"')
    fresh.notify("textDocument/didOpen", {"textDocument": {"uri": URI}})
    assert fresh.shutdown() == 0


@pytest.mark.slow("starts a server with the shipped model")
def test_exit_codes(fresh: LspClient) -> None:
    fresh.initialize()
    fresh.notify("exit", None)
    assert fresh.process.wait(10) == 1
    other = LspClient()
    other.initialize()
    assert other.process.stdin is not None
    other.process.stdin.close()
    assert other.process.wait(10) == 1
    other.close()


def test_snapshot_is_taken_at_receipt(ready: LspClient) -> None:
    """A request and an edit in one write: the request must not see the edit, so it is stale, not wrong."""
    ready.open(URI, TEXT.replace("main", "other"))
    ready.next_id += 1
    request = {
        "jsonrpc": "2.0",
        "id": ready.next_id,
        "method": "textDocument/inlineCompletion",
        "params": {
            "textDocument": {"uri": URI},
            "position": {"line": LINE, "character": COLUMN},
            "context": {"triggerKind": 1},
        },
    }
    change = {
        "jsonrpc": "2.0",
        "method": "textDocument/didChange",
        "params": {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [{"text": "x = 1\n"}]},
    }
    ready.write(ready.frame(request) + ready.frame(change))
    answer = ready.wait(ready.next_id)
    assert answer["result"] == {"items": []}, "line 5 is gone: with the newer text this would be an error"
    assert ready.explain()["last"]["reason"] == "stale"


@pytest.mark.slow("starts a server with the shipped model")
def test_newer_request_supersedes_the_older(fresh: LspClient) -> None:
    """Neovim's own client does not cancel while typing, so the server does."""
    fresh.initialize(options={"mode": "diffusion", "maxDenoisingSteps": 256, "maxLatencyMs": 60000, "debounceMs": 0})
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    older = fresh.send_completion(URI, LINE, COLUMN, invoked=False)
    newer = fresh.send_completion(URI, LINE - 1, COLUMN, invoked=False)
    assert fresh.wait(older)["result"] == {"items": []}
    assert "result" in fresh.wait(newer)
    assert fresh.explain()["counters"]["empty.superseded"] == 1


def test_version_in_the_request_is_kept(ready: LspClient) -> None:
    """Copilot's clients name the version they ask about; lsprotocol drops the field."""
    ready.open(URI, TEXT, version=7)
    params = {
        "textDocument": {"uri": URI, "version": 6},
        "position": {"line": LINE, "character": COLUMN},
        "context": {"triggerKind": 1},
    }
    assert ready.request("textDocument/inlineCompletion", params) == {"items": []}
    assert ready.explain()["last"]["reason"] == "stale"
    params["textDocument"] = {"uri": URI, "version": 7}
    assert ready.request("textDocument/inlineCompletion", params)["items"]


def test_lines_end_where_lsp_says(ready: LspClient) -> None:
    """Form feed and U+2028 are characters of a line; a lone CR ends one."""
    text = "a = '\x0c\u2028'\rb = 2\r\n" + TEXT
    ready.open(URI, text)
    item, *_ = ready.complete(URI, LINE + 2, COLUMN)
    assert item["range"]["start"]["line"] == LINE + 2


def test_typing_the_completion_needs_no_model(ready: LspClient) -> None:
    ready.open(URI, TEXT)
    item, *_ = ready.complete(URI, LINE, COLUMN)
    text = item["insertText"]
    ready.change(URI, 2, edit(LINE, COLUMN, LINE, COLUMN, text[0]))
    (rest,) = ready.complete(URI, LINE, COLUMN + 1, invoked=False)
    assert rest["insertText"] == text[1:]
    assert ready.explain()["last"]["source"] == "cache"


def test_selected_popup_item_is_extended(ready: LspClient) -> None:
    ready.open(URI, "import os\nos.pa\n")
    span = {"start": {"line": 1, "character": 3}, "end": {"line": 1, "character": 5}}
    item, *_ = ready.complete(URI, 1, 5, selectedCompletionInfo={"range": span, "text": "path.join"})
    assert item["range"] == span
    assert item["insertText"].startswith("path.join")
    assert len(item["insertText"]) > len("path.join")


@pytest.mark.slow("starts a server with the shipped model")
def test_automatic_request_while_loading_is_empty_and_invoked_waits(fresh: LspClient) -> None:
    fresh.initialize(window={"workDoneProgress": True})
    fresh.open(URI, TEXT)
    assert fresh.complete(URI, LINE, COLUMN, invoked=False) == []
    assert fresh.explain()["last"]["reason"] == "loading"
    status = fresh.wait_for_notification("didChangeStatus")
    assert status["busy"] is True
    assert fresh.complete(URI, LINE, COLUMN, invoked=True)
    assert any(r["method"] == "window/workDoneProgress/create" for r in fresh.requests)
    kinds = [n["params"]["value"]["kind"] for n in fresh.notifications if n["method"] == "$/progress"]
    assert kinds[0] == "begin"
    fresh.wait_for_notification("$/progress", lambda p: p["value"]["kind"] == "end")


@pytest.mark.slow("starts a server with the shipped model")
def test_settings_from_the_editor(fresh: LspClient) -> None:
    fresh.initialize(options={"maxLines": 0, "nonsense": 1, "enabled": False})
    first = fresh.wait_for_notification("window/showMessage")
    assert "fimserver.maxLines is 0" in first["message"]
    assert "1 to 200" in first["message"]
    fresh.wait_for_notification("window/showMessage", lambda p: "fimserver.nonsense" in p["message"])
    fresh.open(URI, TEXT)
    assert fresh.complete(URI, LINE, COLUMN) == []
    assert fresh.explain()["last"]["reason"] == "disabled"
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"enabled": True}}})
    assert fresh.complete(URI, LINE, COLUMN)


def test_settings_are_pulled_from_clients_that_support_it(fresh: LspClient) -> None:
    fresh.configuration = {"enabled": False}
    fresh.initialize(workspace={"configuration": True})
    fresh.open(URI, TEXT)
    deadline = time.monotonic() + 10
    while not any(r["method"] == "workspace/configuration" for r in fresh.requests) and time.monotonic() < deadline:
        time.sleep(0.02)
    fresh.request("workspace/executeCommand", {"command": "fimserver.explain", "arguments": []})
    fresh.complete(URI, LINE, COLUMN)
    assert fresh.explain()["last"]["reason"] == "disabled"


def test_comments_and_docstrings_are_off_strings_on(ready: LspClient) -> None:
    for text, reason in (("x = 1  # the su\n", "in_comment"), ('"""A modu\n"""\n', "in_docstring")):
        ready.open(URI, text)
        assert ready.complete(URI, 0, len(text.split("\n", maxsplit=1)[0])) == []
        assert ready.explain()["last"]["reason"] == reason
    ready.open(URI, 'mode = "re"\n')
    ready.complete(URI, 0, 10)
    assert ready.explain()["last"].get("reason") != "in_string"


@pytest.mark.slow("starts a server with the shipped model")
def test_bad_model_is_explained_and_fixed_by_a_setting(fresh: LspClient) -> None:
    fresh.replies["window/showMessageRequest"] = {"title": "Load it everywhere"}  # the user is asked first
    fresh.initialize(options={"model": "/no/such/model"})
    error = fresh.wait_for_notification("window/showMessage", lambda params: "/no/such/model" in params["message"])
    assert "folder" in error["message"]
    fresh.open(URI, TEXT)
    assert fresh.complete(URI, LINE, COLUMN) == []
    assert fresh.explain()["last"]["reason"] == "engine"
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"model": "tiny"}}})
    fresh.wait_for_notification("didChangeStatus", lambda p: "tiny on" in p["message"])
    assert fresh.complete(URI, LINE, COLUMN)


def test_dead_engine_is_started_again_and_the_request_answered(fresh: LspClient) -> None:
    fresh.initialize()
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    pid = fresh.explain()["engine"]["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    assert fresh.complete(URI, LINE, COLUMN)
    assert fresh.explain()["engine"]["pid"] != pid


@pytest.mark.slow("starts a server with the shipped model")
def test_engine_ends_with_its_server(fresh: LspClient) -> None:
    fresh.initialize()
    fresh.wait_until_ready()
    pid = fresh.explain()["engine"]["pid"]
    fresh.process.kill()
    fresh.process.wait()
    deadline = time.monotonic() + 10
    while has_memory(pid):
        assert time.monotonic() < deadline, "the worker outlived its server"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_server_process_never_maps_torch(ready: LspClient) -> None:
    maps = Path(f"/proc/{ready.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{ready.explain()['engine']['pid']}/maps").read_text()


@pytest.mark.slow("starts a server with the shipped model")
def test_logs_hold_no_code(tmp_path: Path) -> None:
    client = LspClient(log=tmp_path / "log")
    client.initialize(options={"logLevel": "debug"})
    client.wait_until_ready()
    client.open(URI, TEXT.replace("main", "confidential_name"))
    assert client.complete(URI, LINE, COLUMN)
    client.send("textDocument/inlineCompletion", {"textDocument": "confidential_name"})
    client.notify("textDocument/didChange", {"textDocument": {"uri": URI}, "contentChanges": "confidential_name"})
    client.notify("textDocument/didOpen", {"textDocument": {"text": "confidential_name"}})
    assert client.shutdown() == 0
    client.close()
    log = (tmp_path / "log").read_text()
    assert "a request was answered" in log
    assert "confidential_name" not in log


def test_odd_uris_and_many_documents(ready: LspClient) -> None:
    uris = [
        "untitled:Untitled-1",
        "file:///a%20b/%F0%9F%90%8D.py",
        "vscode-notebook-cell:/x.ipynb#W0",
        "file://",
        "not a uri",
        "//[",
    ]
    for uri in uris:
        ready.open(uri, TEXT)
        assert ready.complete(uri, LINE, COLUMN), uri
        ready.notify("textDocument/didClose", {"textDocument": {"uri": uri}})


@pytest.mark.slow("starts a server with the shipped model")
def test_crlf_document_gets_crlf_and_no_duplicate_cr(ready: LspClient) -> None:
    ready.open(URI, TEXT.replace("\n", "\r\n"))
    item, *_ = ready.complete(URI, LINE, COLUMN)
    assert "\r" not in item["insertText"]
    ready.open(URI, "def add(a, b):\r\n")
    for item in ready.complete(URI, 0, 14):
        assert item["insertText"].count("\n") == item["insertText"].count("\r\n")


def test_other_language_by_lines(ready: LspClient) -> None:
    call = "\treturn addTogether(firstNumber, "
    ready.open(
        "file:///a.go",
        f"package main\n\nfunc one() int {{\n{call}secondNumber)\n}}\n\nfunc two() int {{\n{call}\n}}\n",
        language="go",
    )
    items = ready.complete("file:///a.go", 7, len(call))
    assert items[0]["insertText"].endswith("secondNumber)"), "identical to the line above, whatever the weights are"
    assert not any("\n" in item["insertText"] for item in items)


def test_copilots_notifications_are_taken(ready: LspClient) -> None:
    before = ready.explain()["counters"]
    ready.notify("textDocument/didShowCompletion", {"item": {"insertText": "x"}})
    ready.notify("textDocument/didPartiallyAcceptCompletion", {"item": {}, "acceptedLength": 3})
    ready.notify("textDocument/didFocus", {"textDocument": {"uri": URI}})
    after = ready.explain()["counters"]
    for name in ("didShowCompletion", "didPartiallyAcceptCompletion", "didFocus"):
        assert after[name] == before.get(name, 0) + 1


@pytest.mark.slow("starts a server with the shipped model")
def test_restart_command_brings_a_new_engine(fresh: LspClient) -> None:
    fresh.initialize(options={"threads": 1})
    fresh.wait_until_ready()
    pid = fresh.explain()["engine"]["pid"]
    fresh.request("workspace/executeCommand", {"command": "fimserver.restart", "arguments": []})
    fresh.open(URI, TEXT)
    deadline = time.monotonic() + 30
    while fresh.explain()["engine"]["pid"] in {pid, None}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert fresh.complete(URI, LINE, COLUMN)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_engine_leaves_the_processor_to_the_editor(ready: LspClient) -> None:
    pid = ready.explain()["engine"]["pid"]
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    own = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
    assert int(fields[16]) == min(19, int(own[16]) + 5)


def test_reopened_with_the_same_version_is_another_text(ready: LspClient) -> None:
    ready.open(URI, TEXT.replace("main", "reopened"), version=2)
    request = ready.send_completion(URI, LINE, COLUMN)
    ready.notify("textDocument/didClose", {"textDocument": {"uri": URI}})
    ready.open(URI, "# entirely other\n", version=2)
    assert ready.wait(request)["result"] == {"items": []}


@pytest.mark.slow("starts a server with the shipped model")
def test_an_edit_ends_the_request_about_the_old_text(fresh: LspClient) -> None:
    fresh.initialize()
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    with stopped(fresh):
        request = fresh.send_completion(URI, LINE, COLUMN)
        time.sleep(0.1)
        fresh.change(URI, 2, edit(0, 0, 0, 0, "#\n"))
        assert fresh.wait(request, 5)["result"] == {"items": []}
    assert fresh.explain()["last"]["reason"] == "stale"


def test_an_unreadable_edit_is_never_answered_from_the_old_text(ready: LspClient) -> None:
    ready.open(URI, TEXT)
    broken = {"textDocument": {"uri": URI, "version": 2}, "contentChanges": [{"txt": "x"}]}
    ready.notify("textDocument/didChange", broken)
    answer = ready.wait(ready.send_completion(URI, LINE, COLUMN))
    assert "open it again" in answer["error"]["message"]
    ready.change(URI, 3, {"text": TEXT})
    assert ready.complete(URI, LINE, COLUMN)


@pytest.mark.slow("starts a server with the shipped model")
def test_invoked_requests_survive_a_change_of_settings(fresh: LspClient) -> None:
    """The engine restarts during the request, which waits and is answered by the new one."""
    fresh.initialize()
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    before = fresh.send_completion(URI, LINE, COLUMN)
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"threads": 2}}})
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"threads": 1}}})
    assert fresh.complete(URI, LINE, COLUMN, invoked=False) == []
    assert fresh.explain()["last"]["reason"] == "loading"
    assert fresh.wait(before)["result"]["items"]
    command_line = Path(f"/proc/{fresh.explain()['engine']['pid']}/cmdline").read_text()
    assert '"threads": 1' in command_line


@pytest.mark.slow("starts a server with the shipped model")
def test_invoked_request_before_initialized_waits(fresh: LspClient) -> None:
    fresh.request("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
    fresh.open(URI, TEXT)
    request = fresh.send_completion(URI, LINE, COLUMN)
    assert fresh.send_completion(URI, LINE, COLUMN, invoked=False)
    fresh.notify("initialized", {})
    assert fresh.wait(request)["result"]["items"]


@pytest.mark.slow("starts a server with the shipped model")
def test_leaving_does_not_wait_for_the_model(fresh: LspClient) -> None:
    fresh.initialize()
    fresh.open(URI, TEXT)
    fresh.send_completion(URI, LINE, COLUMN)
    with stopped(fresh):
        assert fresh.shutdown() == 0


@pytest.mark.slow("starts a server with the shipped model")
def test_a_stopped_engine_does_not_stop_the_server(fresh: LspClient) -> None:
    fresh.initialize(options={"debounceMs": 0})
    fresh.wait_until_ready()
    pid = fresh.explain()["engine"]["pid"]
    subprocess.run(["kill", "-STOP", str(pid)], check=True)
    for i in range(40):
        fresh.open(f"{URI}{i}", "x = 1\n" * 2000 + "y = ")
        fresh.send_completion(f"{URI}{i}", 2000, 4, invoked=False)
    assert fresh.explain()["engine"]["state"] == "ready"
    assert fresh.shutdown() == 0
    # a stopped process cannot leave on its own
    subprocess.run(["kill", "-KILL", str(pid)], check=False, stderr=subprocess.DEVNULL)


def test_removed_settings_fall_back(ready: LspClient) -> None:
    def configure(settings: object) -> None:
        ready.notify("workspace/didChangeConfiguration", {"settings": settings})

    ready.open(URI, TEXT)
    configure({"fimserver": {"enabled": False}})
    assert ready.complete(URI, LINE, COLUMN) == []
    configure({"python": {"x": 1}, "editor": {}})
    assert ready.complete(URI, LINE, COLUMN) == []
    configure({"fimserver": {}})
    assert ready.complete(URI, LINE, COLUMN)
    shown = [n["params"]["message"] for n in ready.notifications if n["method"] == "window/showMessage"]
    assert not any("python" in message for message in shown)


def test_other_settings_mean_another_answer(ready: LspClient) -> None:
    ready.open(URI, TEXT)
    ready.complete(URI, LINE, COLUMN)
    ready.complete(URI, LINE, COLUMN)
    assert ready.explain()["last"]["source"] == "cache"
    ready.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"maxLines": 1}}})
    ready.complete(URI, LINE, COLUMN)
    assert ready.explain()["last"]["source"] == "model"
    ready.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {}}})


@pytest.mark.slow("starts a server with the shipped model")
def test_automatic_requests_wait_for_a_pause_and_invoked_ones_do_not(fresh: LspClient) -> None:
    fresh.initialize(options={"debounceMs": 1500})
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    assert fresh.complete(URI, LINE, COLUMN)
    assert "debounce" not in fresh.explain()["last"]["timings_ms"]
    fresh.change(URI, 2, edit(0, 0, 0, 0, "#\n"))
    begin = time.perf_counter()
    fresh.complete(URI, LINE + 1, COLUMN, invoked=False)
    assert time.perf_counter() - begin >= 1.5
    assert "debounce" in fresh.explain()["last"]["timings_ms"]


def test_initialize_twice_and_odd_methods_are_refused(fresh: LspClient) -> None:
    fresh.initialize()
    again = fresh.wait(fresh.send("initialize", {"processId": None, "rootUri": None, "capabilities": {}}))
    assert again["error"]["code"] == -32600
    fresh.send_raw({"jsonrpc": "2.0", "id": 900, "method": 7, "params": {}})
    assert fresh.wait(900)["error"]["code"] == -32600


def test_explain_writes_for_users(ready: LspClient) -> None:
    ready.open(URI, "x = 1  # the su\n")
    ready.complete(URI, 0, 15)
    ready.explain()
    ready.wait_for_notification("window/showMessage", lambda p: "fimserver.comments" in p["message"])
    ready.open("file:///other.py", TEXT)
    ready.complete("file:///other.py", LINE, COLUMN)
    asked = {"command": "fimserver.explain", "arguments": [URI]}
    assert ready.request("workspace/executeCommand", asked)["last"]["reason"] == "in_comment"


SLOW = {"mode": "diffusion", "maxDenoisingSteps": 256, "maxLatencyMs": 60000}


@pytest.mark.slow("starts a server with the shipped model")
def test_an_edit_ends_invoked_requests_too(fresh: LspClient) -> None:
    fresh.initialize(options=SLOW)
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    with stopped(fresh):
        invoked = fresh.send_completion(URI, LINE, COLUMN)
        automatic = fresh.send_completion(URI, LINE, COLUMN, invoked=False)
        fresh.change(URI, 2, edit(0, 0, 0, 0, "#\n"))
        for request in (invoked, automatic):
            assert fresh.wait(request, 5)["result"] == {"items": []}


@pytest.mark.slow("starts a server with the shipped model")
def test_an_ended_request_does_not_wait_for_the_engine(fresh: LspClient) -> None:
    """Neither while the model loads nor while the engine hangs."""
    fresh.initialize()
    fresh.open(URI, TEXT)
    loading = fresh.send_completion(URI, LINE, COLUMN)
    with stopped(fresh):
        fresh.change(URI, 2, {"text": TEXT + "#\n"})
        assert fresh.wait(loading, 5)["result"] == {"items": []}
    fresh.wait_until_ready()
    pid = str(fresh.explain()["engine"]["pid"])
    subprocess.run(["kill", "-STOP", pid], check=True)
    try:
        stuck = fresh.send_completion(URI, LINE, COLUMN)
        fresh.change(URI, 3, {"text": TEXT})
        assert fresh.wait(stuck, 5)["result"] == {"items": []}
    finally:
        subprocess.run(["kill", "-KILL", pid], check=True)  # a stopped process does not see that its server is gone


@pytest.mark.slow("starts a server with the shipped model")
def test_settings_changed_during_a_request_apply(fresh: LspClient) -> None:
    fresh.initialize(options=SLOW)
    fresh.wait_until_ready()
    fresh.open(URI, TEXT)
    first = fresh.send_completion(URI, LINE, COLUMN)
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"mode": "autoregressive"}}})
    fresh.wait(first)
    fresh.complete(URI, LINE, COLUMN)
    explained = fresh.explain()
    is_new = explained["recent"][-2]["facts"].get("mode") == "autoregressive"  # the change came before the model
    assert explained["last"].get("source") != "cache" or is_new
    last = fresh.send_completion(URI, LINE, COLUMN)
    fresh.notify("workspace/didChangeConfiguration", {"settings": {"fimserver": {"enabled": False}}})
    fresh.wait(last)
    assert fresh.complete(URI, LINE, COLUMN) == []


def test_a_null_range_means_the_whole_text(ready: LspClient) -> None:
    ready.open(URI, "x\n")
    ready.change(URI, 2, {"range": None, "rangeLength": None, "text": TEXT})
    assert ready.complete(URI, LINE, COLUMN)


def test_unknown_methods_are_not_found_even_without_parameters(ready: LspClient) -> None:
    ready.send_raw({"jsonrpc": "2.0", "id": 901, "method": "foo/bar"})
    assert ready.wait(901)["error"]["code"] == -32601


def test_an_editor_that_no_longer_reads_is_dropped() -> None:
    process = subprocess.Popen(SERVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    stdin = process.stdin
    assert stdin is not None
    assert process.stdout is not None

    def send(message: dict[str, object]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        stdin.flush()

    send({"id": 1, "method": "initialize", "params": {"processId": None, "rootUri": None, "capabilities": {}}})
    assert process.stdout.readline().startswith(b"Content-Length")
    process.stdout.close()
    deadline = time.monotonic() + 10
    while process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(BrokenPipeError):
            send({"id": 2, "method": "no/such", "params": {}})
        time.sleep(0.05)
    assert process.returncode == 1
    with contextlib.suppress(BrokenPipeError):
        stdin.close()


# With an engine that does what the document orders: see fake_engine.py.

CALL = "def call(first, second):\n    return join(▮)\n"
ANSWER = {"answer": "first, second"}
LINES_5_MB = 5_000_000 // 64


def traces(server: FakeServer) -> list[dict[str, str]]:
    return [n["params"] for n in server.notifications if n["method"] == "$/logTrace"]


def test_traces_name_events_and_no_code(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake()
    server.wait_until_ready()
    order = {"answer": "confidential_answer"}
    uri, line, column = server.show(URI, CALL.replace("first", "confidential_name"), order=order)
    server.complete(uri, line, column)
    assert traces(server) == [], "off is the default"
    server.notify("$/setTrace", {"value": "messages"})
    assert server.complete(uri, line, column)
    server.complete(uri, line, 0)
    server.explain()
    assert traces(server) == [
        {"message": "textDocument/inlineCompletion: cache"},
        {"message": f"textDocument/inlineCompletion: {server.last['reason']}"},
    ]
    server.notify("$/setTrace", {"value": "verbose"})
    server.insert(uri, line, column, "(")
    server.complete(uri, line, column + 1)
    server.explain()
    verbose = traces(server)[2]["verbose"]
    assert " ms" in verbose
    assert "engine ready: fake on cpu" in verbose
    server.notify("$/setTrace", {"value": "off"})
    server.complete(uri, line, column)
    server.explain()
    assert len(traces(server)) == 3
    assert "confidential" not in json.dumps(traces(server))


@pytest.mark.parametrize("uri", ["git:/home/me/app.py?%7B%22ref%22%3A%22HEAD%22%7D", "output:x", "fugitive:///r//0/a"])
def test_views_are_not_completed(fake: FakeServer, uri: str) -> None:
    place = fake.show(uri, CALL, order=ANSWER)
    for invoked in (False, True):
        assert fake.complete(*place, invoked=invoked) == []
        assert fake.last["reason"] == "read_only"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_files_without_write_permission_are_seen() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        names = {"locked ü.py": 0o444, "open ü.py": 0o666}
        for name, mode in names.items():
            (Path(folder) / name).write_text("x = 1\n")
            (Path(folder) / name).chmod(mode)
        uris = {name: (Path(folder) / name).as_uri() for name in names}
        with without_rights():
            found = {name: is_writable(uri) for name, uri in uris.items()}
        assert found == {"locked ü.py": False, "open ü.py": True}
    assert is_writable(f"file://{folder}/new.py"), "a file that does not exist yet can be written"
    for uri in ("untitled:x", "vscode-remote://host/x.py", "file:///%00", "file:///" + "a" * 10_000):
        assert is_writable(uri)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_files_without_write_permission_are_completed_on_invocation_only(start_fake: Callable[..., FakeServer]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with without_rights():
            server = start_fake()
        server.wait_until_ready()
        for name, mode in (("locked", 0o444), ("free", 0o666)):
            file = Path(folder) / name
            file.write_text("x = 1\n")
            file.chmod(mode)
            text = CALL.replace("join", name)
            place = server.show(file.as_uri(), text, order=ANSWER)
            assert bool(server.complete(*place, invoked=False)) == (name == "free")
            assert server.last.get("reason") == (None if name == "free" else "read_only")
            assert server.complete(*place)


@pytest.mark.parametrize(
    "header", ["# Code generated by x. DO NOT EDIT.\n", "# @generated\n", "# Autogenerated by protoc\n"]
)
def test_generated_files_are_completed_on_invocation_only(fake: FakeServer, header: str) -> None:
    place = fake.show(URI, header + CALL, order=ANSWER)
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "generated_file"
    assert fake.complete(*place)
    fake.shut(URI)
    far = "x = 1\n" * 300 + header
    assert fake.complete(*fake.show(URI, far + CALL, order={**ANSWER, "answer": "second"}), invoked=False)


def test_workspace_folders_come_and_go(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake(workspace={"workspaceFolders": True})
    server.wait_until_ready()
    folders = [{"uri": f"file:///home/me/{name}", "name": name} for name in ("one", "two", "größe")]
    for added, removed in ((folders, []), ([], folders[:1]), (folders[:1], folders[1:]), ([], folders)):
        server.notify("workspace/didChangeWorkspaceFolders", {"event": {"added": added, "removed": removed}})
        uri = f"file:///home/me/one/a{len(added)}{len(removed)}.py"
        assert server.complete(*server.show(uri, CALL, order=ANSWER), invoked=False)
    assert server.shutdown() == 0


def test_several_workspace_folders_at_the_start() -> None:
    client = LspClient()
    folders = [{"uri": f"file:///home/me/{name}", "name": name} for name in ("one", "two")]
    params: dict[str, object] = {
        "processId": None,
        "rootUri": None,
        "capabilities": {},
        "workspaceFolders": folders,
    }
    try:
        assert client.request("initialize", params)["capabilities"]
        assert client.shutdown() == 0
    finally:
        client.close()


def test_a_renamed_file_keeps_nothing_of_the_old(fake: FakeServer) -> None:
    """An editor closes the old name and opens the new: cache, explanation and open requests belong to the old one."""
    order = {**ANSWER, "name": "old", "drafts": [""], "step_s": 0.3}
    uri, line, column = fake.show(URI, CALL, order=order)
    fake.complete(uri, line, 0)
    asked = {"command": "fimserver.explain", "arguments": [URI]}
    assert fake.request("workspace/executeCommand", asked)["last"]["outcome"] == "empty"
    open_request = fake.send_completion(uri, line, column)
    fake.wait_until_noted("begun", "old")
    fake.shut(uri)
    assert fake.wait(open_request)["result"]["items"] == []
    new = "file:///home/me/new.py"
    fake.show(new, CALL, order=order)
    assert fake.complete(new, line, column)
    assert fake.last["source"] == "model"
    assert fake.request("workspace/executeCommand", asked)["last"] is None
    answer = fake.wait(fake.send_completion(URI, line, column))
    assert "not open" in answer["error"]["message"]
    fake.show(URI, CALL, order=order)
    fake.complete(URI, line, column)
    assert fake.last["source"] == "model"


@pytest.mark.parametrize("odd", ["\x0c", "\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\ufeff"])
def test_odd_characters_end_no_line(fake: FakeServer, odd: str) -> None:
    """In a line before the cursor, and in the cursor's line."""
    uri, line, column = fake.show(URI, f"name = 1  # a{odd}b\n\nx = ['{odd}', ▮]\n", order={"answer": "name"})
    (item,) = fake.complete(uri, line, column)
    assert item["insertText"] == "name"
    assert item["range"]["start"] == {"line": line, "character": column}
    assert column == 10
    fake.insert(uri, line, column, "n")
    (rest,) = fake.complete(uri, line, column + 1)
    assert rest["insertText"] == "ame"


@pytest.mark.parametrize("odd", [chr(0xD83D), chr(0xDC0D), chr(0xDC0D) + chr(0xD83D)])
def test_half_characters_in_a_text(fake: FakeServer, odd: str) -> None:
    r"""JSON can hold "\ud83d" alone, and an editor that counts in UTF-16 sends it when it cuts an emoji in two."""
    uri, line, column = fake.show(URI, f"name = 1\nx = ['{odd}', ▮]\n", order={"name": "half", "answer": "name"})
    (item,) = fake.complete(uri, line, column)
    assert item["range"]["start"] == {"line": line, "character": column}
    fake.insert(uri, line, column, odd)
    answer = fake.wait(fake.send_completion(uri, line, column + len(odd)))
    assert "result" in answer
    fake.insert(uri, line, column, "", deleted=len(odd))
    assert fake.complete(uri, line, column)


def test_an_emoji_that_arrives_in_halves(fake: FakeServer) -> None:
    uri, line, column = fake.show(URI, "x = ['▮', na]\n", order={"answer": "me"})
    fake.insert(uri, line, column, "\ud83d")
    fake.insert(uri, line, column + 1, "\udc0d")
    (item,) = fake.complete(uri, line, column + 2 + len("', na"))
    assert item["range"]["start"]["character"] == column + 2 + len("', na")


@pytest.mark.parametrize("language", ["python", "go"])
def test_a_line_of_100_000_characters(fake: FakeServer, language: str) -> None:
    cells = "first, " * (100_000 // 7)
    uri, line, column = fake.show(URI, f"x = [{cells}▮, {cells}]\n", language, order={"answer": "name"})
    for i in range(2):
        fake.insert(uri, line, column + i, "x")
        request = fake.send_completion(uri, line, column + i + 1)
        begin = time.perf_counter()
        assert "result" in fake.wait(request)
        assert fake.answers[request]["at"] - begin < 2


def test_positions_past_the_end(fake: FakeServer) -> None:
    """A column past the line's end is its end, as LSP has it; a line past the last is an error."""
    uri, line, column = fake.show(URI, "name = 1\nx = ▮\ny = 2\n", order={"answer": "name"})
    (item,) = fake.complete(uri, line, 10_000)
    assert item["range"]["start"] == {"line": line, "character": column}
    answer = fake.wait(fake.send_completion(uri, line + 900, 0))
    assert answer["error"]["code"] == -32602
    assert "outside the document" in answer["error"]["message"]
    last = fake.wait(fake.send_completion(uri, line + 2, 2**31 - 1))
    assert "result" in last
    fake.change(uri, 2, edit(line + 900, 5, line + 900, 9, "z = "))
    (item,) = fake.complete(uri, line + 2, 99)
    assert item["range"]["start"] == {"line": line + 2, "character": 4}, "an edit there goes to the end"


def show_5_mb(server: FakeServer, where: str, before: str, after: str) -> tuple[int, int]:
    """Open a document of 5 MB with a place to type at its begin, middle or end; return its line and column."""
    lines = [f"value_{i} = compute_the_value_of({i}, offset={i * 7 % 1000})".ljust(63) for i in range(LINES_5_MB)]
    line = {"begin": 1, "middle": LINES_5_MB // 2, "end": LINES_5_MB - 1}[where]
    lines[line - 1 : line + 1] = ['# fake: {"answer": "(1)", "name": "5MB"}', before + after]
    server.open(URI, "\n".join(lines) + "\n")
    return line, len(before)


@pytest.mark.slow("starts a server with the shipped model")
@pytest.mark.parametrize(
    ("where", "before", "settings", "reason"),
    [
        ("begin", "x = first + ", {}, None),
        ("middle", "x = first + ", {}, None),
        ("end", "x = first + ", {}, None),
        ("middle", "x = 1  # a comment ", {}, "in_comment"),
        ("middle", "x = first + ", {"enabled": False}, "disabled"),
    ],
)
def test_every_keystroke_in_5_mb_is_answered_soon(
    fake: FakeServer, where: str, before: str, settings: dict[str, object], reason: str | None
) -> None:
    """All except the model: the edit, the tree, the hole, the matches, the prompt, the check of the answer."""
    fake.set(**settings)
    line, column = show_5_mb(fake, where, before, "")
    fake.complete(URI, line, column)
    slow, work = [], []
    for i, letter in enumerate(string.ascii_letters[:30]):
        begin, worked = time.perf_counter(), worked_s(fake)
        fake.insert(URI, line, column + i, letter)
        request = fake.send_completion(URI, line, column + i + 1, invoked=False)
        fake.wait(request)
        slow.append(fake.answers[request]["at"] - begin)
        work.append(worked_s(fake) - worked)
    assert fake.last.get("reason") == reason
    assert len(fake.noted("begun", "5MB")) == (31 if reason is None else 0)
    assert sorted(slow)[15] < 1, slow
    assert max(work) < 0.25, work  # processor time, which other programs do not change


def test_deleted_text_is_offered_when_typed_again(fake: FakeServer) -> None:
    moved = "    remaining_bytes = response.headers.content_length - received_bytes\n"
    text = f"def first(response):\n    a = 1\n{moved}\n\ndef second(response):\n    b = 2\n▮\n"
    uri, line, _ = fake.show(URI, text, order={"name": "moved", "answer": "1"})
    begun = "    remaining_bytes = response.headers"
    fake.change(uri, 2, edit(3, 0, 4, 0, ""))
    fake.change(uri, 3, edit(line - 1, 0, line - 1, 0, begun))
    (item,) = fake.complete(uri, line - 1, len(begun), invoked=False)
    assert item["insertText"] == moved.strip("\n").removeprefix(begun)
    assert fake.last["source"] == "match"
    assert fake.noted("begun", "moved") == []


def test_a_sure_match_needs_no_model(start_fake: Callable[..., FakeServer]) -> None:
    server = start_fake(load_s=60)
    place = server.show(URI, "values = read_measurements(folder, 'a.csv')\nb = 1\nvalues = read_measurements(fold▮\n")
    (item,) = server.complete(*place, invoked=False)
    assert item["insertText"] == "er, 'a.csv')"
    assert server.last["source"] == "match"
    assert server.explain()["engine"]["state"] == "loading"


def test_languages_can_be_off(fake: FakeServer) -> None:
    fake.set(languages={"python": False})
    place = fake.show(URI, CALL, order=ANSWER)
    for invoked in (False, True):
        assert fake.complete(*place, invoked=invoked) == []
        assert fake.last["reason"] == "language_off"
    fake.set(languages={"*": False, "python": True})
    assert fake.complete(*place)


GO = "package main\n\nfunc add(first int, second int) int {\n\treturn join(▮)\n}\n"


def test_an_unknown_language_is_completed_on_invocation(fake: FakeServer) -> None:
    place = fake.show("file:///a.go", GO, "go", order={**ANSWER, "name": "go"})
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "language_not_learned"
    assert "python" in fake.last["detail"]
    assert fake.noted("begun", "go") == []
    (item,) = fake.complete(*place)
    assert item["insertText"] == "first, second"
    assert len(fake.noted("begun", "go")) == 1


def test_an_unknown_language_gets_matches(fake: FakeServer) -> None:
    call = "\tfirst, second := readMeasurements(folder, name)\n"
    text = f"package main\n\nfunc a() {{\n{call}}}\n\nfunc b() {{\n\tfirst, second := readMeasurements(▮\n}}\n"
    place = fake.show("file:///b.go", text, "go", order={"answer": "x)"})
    (item,) = fake.complete(*place, invoked=False)
    assert item["insertText"] == "folder, name)"
    assert fake.last["source"] == "match"


def test_the_shipped_model_lists_its_languages(ready: LspClient) -> None:
    ready.open("file:///shipped.go", GO.replace("▮", ""), language="go")
    assert ready.complete("file:///shipped.go", 3, 13, invoked=False) == []
    assert ready.explain()["last"]["reason"] == "language_not_learned"


def test_a_nul_in_a_text_does_not_crash(fake: FakeServer) -> None:
    """No Python file may hold one, so no answer leaves the code sound: the answer is empty, with the reason."""
    uri, line, column = fake.show(URI, "name = 1\nx = ['\x00', ▮]\n", order={"answer": "name"})
    assert fake.complete(uri, line, column) == []
    assert fake.last["reason"] == "syntax"
    fake.change(uri, 2, edit(line, 6, line, 7, ""))
    assert fake.complete(uri, line, column - 1)
