"""Notebooks: the cells above a cell are its context, and a new daemon receives them."""

import asyncio
from typing import Any

import pytest
from support.connection import Connection
from support.relay_editor import Editor, until

from fimserver.datatypes import FimContext, Mode, ModelInfo
from fimserver.engine.client import EngineClient, EngineState
from fimserver.errors import EngineError
from fimserver.lsp.features import create_server

BOOK = "file:///book.ipynb"


def cell_uri(name: str) -> str:
    return f"vscode-notebook-cell:/book.ipynb#{name}"


def cell(name: str, kind: int = 2) -> dict[str, Any]:
    return {"kind": kind, "document": cell_uri(name)}


def item(name: str, text: str, language: str = "python") -> dict[str, Any]:
    return {"uri": cell_uri(name), "languageId": language, "version": 1, "text": text}


OPENED = {
    "notebookDocument": {
        "uri": BOOK,
        "notebookType": "jupyter-notebook",
        "version": 1,
        "cells": [cell("a"), cell("prose", 1), cell("b"), cell("c")],
    },
    "cellTextDocuments": [
        item("a", "import numpy as np"),
        item("prose", "# A title", "markdown"),
        item("b", "table = np.zeros(3)\n"),
        item("c", "print(ta"),
    ],
}


def change(**cells: Any) -> dict[str, Any]:
    return {"notebookDocument": {"uri": BOOK, "version": 2}, "change": {"cells": cells}}


def edit(name: str, character: int, text: str) -> dict[str, Any]:
    at = {"line": 0, "character": character}
    return {
        "document": {"uri": cell_uri(name), "version": 2},
        "changes": [{"range": {"start": at, "end": at}, "text": text}],
    }


def move(start: int, count: int, *cells: Any, opened: Any = (), closed: Any = ()) -> dict[str, Any]:
    return {
        "array": {"start": start, "deleteCount": count, "cells": list(cells)},
        "didOpen": list(opened),
        "didClose": [{"uri": cell_uri(name)} for name in closed],
    }


class Watched(EngineClient):
    """An engine that records its requests and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.info = ModelInfo("watched", "cpu", "float32", 1, 100, 4, Mode.DIFFUSION, 1.0, 1)
        self.contexts: list[FimContext] = []

    @property
    def state(self) -> EngineState:
        return EngineState.READY

    def start(self) -> None:
        pass

    def complete(self, context: FimContext, *_: Any, **__: Any) -> Any:
        self.contexts.append(context)
        raise EngineError(self.detail)


def run(*changes: tuple[str, Any], ask: str = "c") -> FimContext | None:
    """Return the engine's request at the end of a cell's first line, after some messages."""

    async def scenario() -> FimContext | None:
        engine = Watched()
        connection = Connection(create_server({}, engine))
        await connection.initialize()
        for method, params in (("notebookDocument/didOpen", OPENED), *changes):
            connection.notify(method, params)
        document = connection.server.session.documents[cell_uri(ask)]
        params = {
            "textDocument": {"uri": cell_uri(ask)},
            "position": {"line": 0, "character": len(document.text.split("\n")[0])},
            "context": {"triggerKind": 1},
        }
        await connection.request("textDocument/inlineCompletion", params)
        return engine.contexts[-1] if engine.contexts else None

    return asyncio.run(scenario())


def test_cells_above_stand_before_a_cell() -> None:
    context = run()
    assert context is not None
    assert context.prefix == "import numpy as np\ntable = np.zeros(3)\nprint(ta"
    assert "title" not in repr(context)


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        (
            [change(textContent=[edit("a", 0, "# first\n")])],
            "# first\nimport numpy as np\ntable = np.zeros(3)\nprint(ta",
        ),
        ([change(textContent=[edit("c", 8, "b")])], "import numpy as np\ntable = np.zeros(3)\nprint(tab"),
        ([change(structure=move(0, 1, closed=["a"]))], "table = np.zeros(3)\nprint(ta"),
        (
            [change(structure=move(3, 0, cell("d"), opened=[item("d", "tail = 1")]))],
            "import numpy as np\ntable = np.zeros(3)\ntail = 1\nprint(ta",
        ),
        (
            [change(structure=move(2, 1)), change(structure=move(0, 0, cell("b")))],
            "table = np.zeros(3)\nimport numpy as np\nprint(ta",
        ),
        ([{"notebookDocument": {"uri": BOOK, "version": 2}, "change": {"metadata": {}}}], None),
    ],
)
def test_cells_change(changes: list[Any], prefix: str | None) -> None:
    context = run(*(("notebookDocument/didChange", each) for each in changes))
    assert context is not None
    assert context.prefix == (prefix or "import numpy as np\ntable = np.zeros(3)\nprint(ta")


def test_a_closed_notebook_is_forgotten() -> None:
    async def scenario() -> None:
        connection = Connection(create_server({}, Watched()))
        await connection.initialize()
        connection.notify("notebookDocument/didOpen", OPENED)
        assert len(connection.server.session.documents) == 4
        closed = {"notebookDocument": {"uri": BOOK}, "cellTextDocuments": [{"uri": cell_uri("a")}]}
        connection.notify("notebookDocument/didClose", closed)
        assert connection.server.session.documents == {}

    asyncio.run(scenario())


def test_a_change_that_cannot_be_read_loses_its_cells() -> None:
    async def scenario() -> set[str]:
        connection = Connection(create_server({}, Watched()))
        await connection.initialize()
        connection.notify("notebookDocument/didOpen", OPENED)
        bad = change(textContent=[{**edit("c", 0, "x"), "changes": 5}])
        connection.notify("notebookDocument/didChange", bad)
        return connection.server.session.lost

    assert asyncio.run(scenario()) == {cell_uri("c")}


def test_the_next_daemon_receives_notebooks() -> None:
    editor = Editor()
    editor.begin()
    editor.say("notebookDocument/didOpen", OPENED)
    editor.say("notebookDocument/didChange", change(textContent=[edit("c", 8, "b")]))
    new = change(structure=move(1, 2, cell("d"), opened=[item("d", "tail = 1")], closed=["prose", "b"]))
    editor.say("notebookDocument/didChange", new)
    until(lambda: len(editor.daemon.received) == 6)
    sent = editor.lose_daemon().received
    assert [m["method"] for m in sent][-2:] == ["textDocument/didOpen", "notebookDocument/didOpen"]
    notebook = sent[-1]["params"]
    assert [c["document"] for c in notebook["notebookDocument"]["cells"]] == [cell_uri(name) for name in "adc"]
    assert notebook["notebookDocument"]["version"] == 2
    assert [(i["text"], i["version"]) for i in notebook["cellTextDocuments"]] == [
        ("import numpy as np", 1),
        ("tail = 1", 1),
        ("print(tab", 2),
    ]
    editor.say("notebookDocument/didClose", {"notebookDocument": {"uri": BOOK}, "cellTextDocuments": []})
    until(lambda: editor.daemon.methods[-1] == "notebookDocument/didClose")
    assert "notebookDocument/didOpen" not in editor.lose_daemon().methods
    editor.leave()
