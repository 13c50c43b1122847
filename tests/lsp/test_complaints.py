"""Twenty complaints that users have about completion servers, each as a test."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.connection import connection, is_in, until
from support.fake_engine import MARK, WORKER, FakeServer, configure, read_journal
from support.filling import fill
from support.lsp_client import LspClient, has_memory

from fimserver.engine.client import EngineClient, EngineOptions, EngineState

URI = "file:///home/me/complaint.py"
CALL = "def call(first, second):\n    return join(▮)\n"
ANSWER = {"answer": "first, second"}
PRIVATE = 'SERVICE_NAME = 1\nSERVICE_ACCESS_TOKEN = "hunter2hunter2hunter2"'


def inserted(items: list[dict[str, Any]]) -> list[str]:
    return [item["insertText"] for item in items]


def test_one_model_per_editor_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two connections share one engine client, which has one process."""
    journal = tmp_path / "journal"
    for name, value in configure(journal).items():
        monkeypatch.setenv(name, value)

    async def scenario() -> None:
        engine = EngineClient(EngineOptions(threads=1, command=WORKER))
        async with connection(engine) as one, connection(engine) as other:
            for window in (one, other):
                await window.initialize({"threads": 1, "debounceMs": 0})
            await until(lambda: is_in(engine, EngineState.READY))
            assert await one.complete()
            assert await other.complete()
            pids = {window.server.explain()["engine"]["pid"] for window in (one, other)}
            assert pids == {engine.pid}
            assert read_journal(journal, "loaded") == [engine.pid]
            assert len(read_journal(journal, "begun")) == 2
        engine.close()

    asyncio.run(scenario())


def test_requests_pile_up_on_a_local_model(fake: FakeServer) -> None:
    """Of ten requests in a burst, each at another place, the newest is answered in the time of one."""
    order = {"name": "pile", "answer": "1", "drafts": [""] * 6, "step_s": 0.1}
    uri, line, column = fake.show(URI, "value = [▮]\n", order=order)
    requests = []
    begin = time.perf_counter()
    for i in range(10):
        fake.insert(uri, 0, 0, "\n")
        requests.append(fake.send_completion(uri, line + i + 1, column, invoked=False))
    assert inserted(fake.wait(requests[-1])["result"]["items"]) == ["1"]
    assert fake.answers[requests[-1]]["at"] - begin < 1.5, "one takes 0.6 s, ten take 6 s"
    assert all(fake.wait(request)["result"]["items"] == [] for request in requests[:-1])
    assert fake.answers[requests[-2]]["at"] < fake.answers[requests[-1]]["at"]
    begun, ended = len(fake.noted("begun", "pile")), len(fake.noted("cancelled", "pile"))
    assert begun == ended + 1, "the model finished the newest alone"


def test_slow_or_silent(start_fake: Callable[..., FakeServer]) -> None:
    """While the model loads, a request is answered at once with a reason, and the status says "loading"."""
    server = start_fake(load_s=60)
    place = server.show(URI, CALL, order=ANSWER)
    server.wait_for_notification("didChangeStatus", lambda p: p["busy"] and "loading" in p["message"])
    before = len(server.notifications)
    begin = time.perf_counter()
    assert server.complete(*place, invoked=False) == []
    assert time.perf_counter() - begin < 5
    assert server.last["reason"] == "loading"
    sent = [n["params"] for n in server.notifications[before:] if n["method"] == "didChangeStatus"]
    assert sent
    assert sent[0]["busy"] is True


@pytest.mark.parametrize(
    ("marked", "answer", "filled"),
    [
        ("open(fi▮)\n", "le)", "open(file)\n"),
        ("open(names[fi▮])\n", "le])", "open(names[file])\n"),
        ("open(fi▮)\n", "le, mode(1))", "open(file, mode(1))\n"),
        ("open(▮)\n", "str(x))", "open(str(x))\n"),
        ("x = {\n    'a': f(▮),\n}\n", "b),", "x = {\n    'a': f(b),\n}\n"),
    ],
)
def test_closing_bracket_duplicated(marked: str, answer: str, filled: str) -> None:
    assert fill(marked, answer) == filled


@pytest.mark.parametrize(
    ("marked", "answer", "filled"),
    [
        ('open("da▮")\n', 'ta.txt")', 'open("data.txt")\n'),
        ('open("da▮")\n', 'ta.txt"', 'open("data.txt")\n'),
        ("x = ['a▮']\n", "bc']", "x = ['abc']\n"),
        ('x = f"{a}▮"\n', '{b}"', 'x = f"{a}{b}"\n'),
        ('open("da▮)\n', 'ta.txt")', 'open("data.txt")\n'),
    ],
)
def test_closing_quote_duplicated(marked: str, answer: str, filled: str) -> None:
    assert fill(marked, answer) == filled


@pytest.mark.parametrize(
    ("marked", "answer", "filled"),
    [
        (
            "def f(a):\n    ▮\n    return total\n",
            "total = a + 1\n    return total",
            "def f(a):\n    total = a + 1\n    return total\n",
        ),
        ("def f(a):\n    ▮\n    return total\n", "return total", "! repeats_suffix"),
        ("total = add(a▮) + offset\n", ", b) + offset", "total = add(a, b) + offset\n"),
        ("if a:\n    ▮\nelse:\n    b()\n", "c()\nelse:\n    b()", "if a:\n    c()\nelse:\n    b()\n"),
    ],
)
def test_repeats_code_that_follows_the_cursor(marked: str, answer: str, filled: str) -> None:
    assert fill(marked, answer) == filled


@pytest.mark.parametrize(
    ("marked", "answer", "filled"),
    [
        (
            "def f(a):\n\tif a:\n\t\treturn 1\n\n\ndef g(a):\n\tif a:▮\n",
            "\n        return 2",
            "def f(a):\n\tif a:\n\t\treturn 1\n\n\ndef g(a):\n\tif a:\n\t\treturn 2\n",
        ),
        (
            "def f(a):\n  if a:\n    return 1\n\n\ndef g(a):▮\n",
            "\n    return 2",
            "def f(a):\n  if a:\n    return 1\n\n\ndef g(a):\n  return 2\n",
        ),
        (
            "class A:\n    def f(self):\n        ▮\n",
            "x = 1\n        return x\n\n    def g(self):",
            "class A:\n    def f(self):\n        x = 1\n        return x\n",
        ),
    ],
)
def test_wrong_indentation(marked: str, answer: str, filled: str) -> None:
    assert fill(marked, answer) == filled


def test_fights_with_the_popup_menu(fake: FakeServer) -> None:
    """An offer extends the selected item; if the model has no such answer, nothing is offered next to the menu."""
    uri, line, column = fake.show(URI, "import os\nos.pa▮\n", order={"answer": "(first)"})
    span = {"start": {"line": line, "character": 3}, "end": {"line": line, "character": column}}
    selected = {"range": span, "text": "path.join"}
    (item,) = fake.complete(uri, line, column, selectedCompletionInfo=selected)
    assert item["range"] == span
    assert item["insertText"] == "path.join(first)"
    fake.shut(uri)
    place = fake.show(URI, "import os\nos.pa▮\n", order={"answer": ""})
    assert fake.complete(*place, selectedCompletionInfo=selected) == []
    assert fake.last["reason"] == "empty"


def test_fights_with_the_popup_menu_over_tab(fake: FakeServer) -> None:
    """An item inserts exactly at the cursor, replaces nothing, and reports its acceptance."""
    uri, line, column = fake.show(URI, CALL, order=ANSWER)
    (item,) = fake.complete(uri, line, column, invoked=False)
    here = {"line": line, "character": column}
    assert item["range"] == {"start": here, "end": here}
    assert item["command"]["command"] == "fimserver.didAcceptCompletion"
    assert item["command"]["arguments"] == [fake.last["id"]]


@pytest.mark.parametrize("marked", ["x = 1  # the ▮\n", "# the ▮\n", "x = 1\n#▮\n"])
def test_completions_inside_comments(fake: FakeServer, marked: str) -> None:
    place = fake.show(URI, marked, order={"name": "comment", "answer": "answer"})
    for invoked in (True, False):
        assert fake.complete(*place, invoked=invoked) == []
        assert fake.last["reason"] == "in_comment"
    assert fake.noted("begun", "comment") == []
    fake.set(comments=True)
    assert fake.complete(*place)


def test_too_eager_while_typing(fake: FakeServer) -> None:
    """debounceMs: a burst of characters asks the model once, after the pause."""
    fake.set(debounceMs=200)
    uri, line, column = fake.show(URI, CALL, order={"name": "eager", **ANSWER})
    for i, character in enumerate("fir"):
        fake.insert(uri, line, column + i, character)
        request = fake.send_completion(uri, line, column + i + 1, invoked=False)
    begin = time.perf_counter()
    fake.wait(request)
    assert fake.answers[request]["at"] - begin > 0.15
    assert len(fake.noted("begun", "eager")) == 1


def test_too_eager_with_unsure_answers(fake: FakeServer) -> None:
    """minConfidence: answers below it are not shown."""
    fake.set(minConfidence=0.6, learnFromUse=False)  # acceptances in other tests do not count here
    for name, confidence in (("unsure", 0.59), ("sure", 0.61)):
        text = CALL.replace("join", name)
        place = fake.show(URI.replace(".py", f"_{name}.py"), text, order={**ANSWER, "confidence": confidence})
        assert bool(fake.complete(*place, invoked=False)) == (name == "sure")
    assert fake.complete(*fake.show(URI, CALL, order={**ANSWER, "confidence": 0.5})) == []
    assert fake.last["reason"] == "low_confidence"
    assert "0.50" in fake.last["detail"]


def test_no_snooze(fake: FakeServer) -> None:
    place = fake.show(URI, CALL, order=ANSWER)
    fake.snooze(3)
    assert fake.complete(*place, invoked=False) == []
    assert fake.last["reason"] == "snoozed"
    assert "3 more minutes" in fake.last["detail"]
    assert fake.complete(*place), "invoked requests are answered"
    fake.snooze(0)
    assert fake.complete(*place, invoked=False)
    fake.snooze()
    assert fake.complete(*place, invoked=False) == []
    assert "5 more minutes" in fake.last["detail"]
    fake.snooze(0.002)
    time.sleep(0.15)
    assert fake.complete(*place, invoked=False), "the snooze ends automatically"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_held_while_idle(start_fake: Callable[..., FakeServer]) -> None:
    """The model's process ends after idleUnloadMinutes, and starts again with the next edit."""
    server = start_fake(options={"idleUnloadMinutes": 0.004})
    server.wait_until_ready()
    (pid,) = server.noted("loaded")
    assert Path(f"/proc/{pid}").exists()
    server.wait_for_notification("didChangeStatus", lambda p: "idle minutes" in p["message"])
    deadline = time.monotonic() + 5
    while has_memory(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.explain()["engine"]["pid"] is None
    uri, line, column = server.show(URI, CALL, order=ANSWER)
    server.insert(uri, line, column, "f")
    deadline = time.monotonic() + 5
    while len(server.noted("loaded")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.complete(uri, line, column + 1)


@pytest.mark.parametrize(
    "uri",
    [
        "vscode-remote://ssh-remote%2Bbuild-host/home/me/app.py",
        "vscode-remote://wsl%2Bubuntu/home/me/app.py",
        "vscode-vfs://github/me/app/app.py",
        "ssh://host/home/me/app.py",
    ],
)
def test_remote_hosts(fake: FakeServer, uri: str) -> None:
    assert inserted(fake.complete(*fake.show(uri, CALL, order=ANSWER), invoked=False)) == ["first, second"]


def test_notebooks(fake: FakeServer) -> None:
    """A cell is a document of its own; the text of other cells is part of its prompt."""
    cell = "vscode-notebook-cell:/home/me/x.ipynb#W{}sZmlsZQ%3D%3D"
    assert fake.complete(*fake.show(cell.format(0), CALL, order=ANSWER))
    fake.open(cell.format(1), 'measurements = read_measurements(folder, ".csv")\n')
    place = fake.show(cell.format(2), "measurements = read_measurements(▮\n", order={"name": "cell", "answer": "x)"})
    assert inserted(fake.complete(*place, invoked=False)) == ['folder, ".csv")']
    assert fake.last["source"] == "match"
    assert fake.noted("begun", "cell") == []


@pytest.mark.parametrize(
    "uri",
    [
        "file:///home/me/.env",
        "file:///home/me/.env.production",
        "file:///c%3A/code/%2Eenv",
        "vscode-remote://ssh-remote%2Bhost/home/me/.netrc",
        "file:///home/me/.ssh/id_ed25519",
        "file:///home/me/server.pem",
    ],
)
def test_private_files_sent_to_a_model(fake: FakeServer, uri: str) -> None:
    """Nothing is offered in private files, and other files get no match, snippet or deleted text from them."""
    begun = "SERVICE_NAME = 1\nSERVICE_ACCESS_TOKEN = "
    assert fake.complete(*fake.show(uri, f"{PRIVATE}\n{begun}▮\n")) == []
    assert fake.last["reason"] == "private_file"
    order = {"name": "elsewhere", "answer": "load()"}
    place = fake.show(URI, f"{begun}▮\n", order=order)
    assert inserted(fake.complete(*place)) == ["load()"]
    fake.change(uri, 2, {"text": "x = 1\n"})  # text deleted there is not offered elsewhere either
    fake.insert(URI, 0, 0, "\n")
    assert inserted(fake.complete(URI, place[1] + 1, place[2])) == ["load()"]
    prompt_text = json.dumps(fake.noted("begun"))
    assert "SERVICE_NAME" in prompt_text
    assert "hunter2" not in prompt_text
    public = "file:///home/me/settings.py"
    fake.open(public, f"{PRIVATE}\n")
    fake.insert(URI, 0, 0, "\n")
    assert inserted(fake.complete(URI, place[1] + 2, place[2])) == ["load()"], "nor is a secret of other files"
    fake.open("file:///home/me/usual.py", f"{begun}read_token_of(account)\n")
    fake.insert(URI, 0, 0, "\n")
    assert "read_token_of(account)" in fake.complete(URI, place[1] + 3, place[2])[0]["insertText"], (
        "a file that is not private is completed"
    )


@pytest.mark.parametrize("name", ["größe", "变量", "\U0001d4b3x", "e\u0301te\u0301"])
def test_crashes_on_text_beyond_ascii(fake: FakeServer, name: str) -> None:
    marked = f'# ✓ \U0001f469\u200d\U0001f4bb\n{name} = "\U0001f40d", join(▮)\n'
    place = fake.show(URI, marked, order={"answer": f'{name}, "é\U0001f40d"'})
    (item,) = fake.complete(*place)
    assert item["insertText"] == f'{name}, "é\U0001f40d"'
    assert item["range"]["start"] == {"line": place[1], "character": place[2]}


def test_crlf(fake: FakeServer) -> None:
    """The offer has the file's own line ends, and no line end is doubled."""
    marked = "def f(a):\r\n    ▮\r\n\r\n\r\nx = 1\r\n"
    order = {"name": "crlf", "answer": "b = a\n    return b\n"}
    place = fake.show(URI, marked, order=order)
    assert inserted(fake.complete(*place)) == ["b = a\r\n    return b"]
    (seen,) = fake.noted("begun", "crlf")
    assert "\r" not in seen["prefix"] + seen["suffix"], "the model reads what it has learned"


@pytest.mark.parametrize(
    "uri", ["", "not a uri", "//[", "file://", "file:///%", "file:///%00", "c:\\x.py", "http://[::1", "untitled:x"]
)
def test_malformed_uris(fake: FakeServer, uri: str) -> None:
    assert fake.complete(*fake.show(uri, CALL, order=ANSWER), invoked=False)
    assert fake.last["outcome"] == "offered"


def test_computed_but_never_shown_without_a_reason(fake: FakeServer) -> None:
    """Every empty answer has a reason: a word for programs and a sentence for users."""
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any], Any]] = [
        (CALL, "", {}, {}, "empty"),
        (CALL, ")))", {}, {}, {"empty", "syntax", "repeats_suffix"}),
        ("def f(a):\n    ▮\n    return total\n", "return total", {}, {}, "repeats_suffix"),
        ("x = 1  # ▮\n", "a", {}, {}, "in_comment"),
        ('def f():\n    """The ▮"""\n', "a", {}, {}, "in_docstring"),
        ('x = "▮"\n', "a", {"strings": False}, {}, "in_string"),
        ("x = ▮word\n", "a", {}, {}, "before_word"),
        (CALL, "first", {"enabled": False}, {}, "disabled"),
        (CALL, "first", {"languages": {"python": False}}, {}, "language_off"),
        (CALL, "first", {"minConfidence": 1}, {"confidence": 0.5}, "low_confidence"),
        ("# Code generated by make. DO NOT EDIT.\n" + CALL, "first", {}, {}, "generated_file"),
    ]
    for number, (marked, answer, settings, order, reason) in enumerate(cases):
        fake.set(**settings)
        uri = f"{URI}{number}"
        place = fake.show(uri, marked, order={"answer": answer, **order})
        assert fake.complete(*place, invoked=False) == [], (reason, answer)
        last = fake.last
        assert last["outcome"] == "empty"
        assert last["reason"] in ({reason} if isinstance(reason, str) else reason)
        assert len(last["detail"]) > 20
        reported = [n["params"]["message"] for n in fake.notifications if n["method"] == "window/showMessage"]
        assert last["detail"] in reported[-1]
        fake.shut(uri)


@pytest.mark.parametrize("accepted", ["first", "first, ", "first, second"])
def test_accept_by_word(fake: FakeServer, accepted: str) -> None:
    """An accepted part is an edit like any other: the rest is offered without the model."""
    answer = "first, second, third"
    uri, line, column = fake.show(URI, CALL, order={"name": "word", "answer": answer})
    assert inserted(fake.complete(uri, line, column)) == [answer]
    fake.insert(uri, line, column, accepted)
    assert inserted(fake.complete(uri, line, column + len(accepted), invoked=False)) == [answer.removeprefix(accepted)]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", "word")) == 1


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_accept_by_line(fake: FakeServer, ending: str) -> None:
    marked = "def f(a):\n    ▮\n\n\nx = 1\n".replace("\n", ending)
    order = {"name": "line", "answer": "b = a\n    c = b\n    return c\n"}
    uri, line, column = fake.show(URI, marked, order=order)
    offered = f"b = a{ending}    c = b{ending}    return c"
    assert inserted(fake.complete(uri, line, column)) == [offered]
    fake.insert(uri, line, column, f"b = a{ending}    ")
    assert inserted(fake.complete(uri, line + 1, 4, invoked=False)) == [f"c = b{ending}    return c"]
    assert fake.last["source"] == "cache"
    assert len(fake.noted("begun", "line")) == 1


WATCH = """
import os, sys
def watch(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"}:
        note(f"network {event} {args[1:]}")
    elif event == "import" and args[0] == "torch":
        note("offline " + os.environ.get("HF_HUB_OFFLINE", ""))
def note(text):
    with open(os.environ["WATCHED"], "a") as file:
        file.write(text + "\\n")
note("watched")
sys.addaudithook(watch)
"""


@pytest.mark.slow("starts servers with a model")
def test_needs_an_account_or_a_network(tmp_path: Path) -> None:
    """The real server and its model run under an audit hook that sees every connection."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    notes = tmp_path / "notes"
    client = LspClient(env={"PYTHONPATH": str(tmp_path), "WATCHED": str(notes), "HF_HUB_OFFLINE": "0"})
    try:
        client.initialize(options={"seed": 0})
        client.open(URI, CALL.replace(MARK, ""))
        assert client.complete(URI, 1, 16)
        assert client.shutdown() == 0
    finally:
        client.close()
    lines = notes.read_text().splitlines()
    assert lines.count("watched") >= 2, "the server and the worker"
    assert set(lines) == {"watched", "offline 1"}
