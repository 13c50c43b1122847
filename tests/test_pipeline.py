"""The language server and the command line offer the same at the same places: text, source and reason."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.connection import Connection, until
from support.local_analysis import LocalAnalysis

from fimserver.cli import complete as cli_complete
from fimserver.cli.main import main
from fimserver.context.languages.names import language_of_path
from fimserver.engine.client import EngineClient, EngineOptions
from fimserver.lsp.features import create_server

MARK = "\u25ae"
# Each place: a file's name, its text, and another open file of the same language, from which a match may come.
PLACES = {
    "python, a call": ("app.py", "items = []\nitems.append(1)\nitems.ap\u25ae\n", "names.append(2)\n"),
    "python, a call known from elsewhere": (
        "call.py",
        "value = \u25ae\n",
        "value = compute_everything_again(first_argument, second_argument)\n",
    ),
    "python, repeated code": (
        "repeated.py",
        "print(first_argument, second_argument, third_argument)\nprint(first_argument, second_argument, \u25ae\n",
        "print(0)\n",
    ),
    "python, a comment": ("comment.py", "# what this \u25ae\nx = 1\n", "y = 2\n"),
    "python, a header": ("header.py", "def read(path):\u25ae\n", "def write(path):\n    return path\n"),
    "javascript, a call": ("app.js", "const names = [];\nnames.pu\u25ae\n", "names.push(1);\n"),
    "javascript, repeated code": (
        "repeated.js",
        "connection.execute_script(first, second);\nother();\nconnection.execute_script(first, \u25ae\n",
        "connection.execute_script(first, third);\n",
    ),
    "javascript, a string": ("string.js", 'const text = "hello \u25ae";\n', 'const text = "hello world";\n'),
    "typescript, a type": ("app.ts", "const names: string\u25ae = [];\n", "const names: string[] = [];\n"),
    "go, an assignment": (
        "app.go",
        "package main\n\nfunc main() {\n\tvalue := connection.executeScriptNow(first, \u25ae\n}\n",
        "package main\n\nfunc other() {\n\tvalue := connection.executeScriptNow(first, second)\n}\n",
    ),
    "go, a comment": ("comment.go", "package main\n\n// what this \u25ae\n", "package main\n"),
    "rust, a let": (
        "app.rs",
        "fn main() {\n    let value = \u25ae;\n}\n",
        "fn other() {\n    let value = compute_everything_again(first, second);\n}\n",
    ),
    "rust, a call": ("call.rs", "fn main() {\n    println!(\u25ae\n}\n", 'fn other() {\n    println!("done");\n}\n'),
    "java, a return": (
        "App.java",
        "class App {\n    int size() {\n        return \u25ae;\n    }\n}\n",
        "class B {\n    int size() {\n        return 1;\n    }\n}\n",
    ),
    "java, after a word": ("Word.java", "class Word\u25aes {}\n", "class Words {}\n"),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineClient]:
    client = EngineClient(EngineOptions())
    client.start()
    client.wait_until_ready(120)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def shared_engine(engine: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes the running engine instead of starting one for each place."""

    class Shared:
        def __init__(self, _options: EngineOptions) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def close(self) -> None: ...

    monkeypatch.setattr(cli_complete, "EngineClient", Shared)
    monkeypatch.setattr("fimserver.context.gather.find_matches.__kwdefaults__", {"max_seconds": 10.0})


def by_command(file: Path, text: str, other: Path | None, seed: int | None) -> dict[str, Any]:
    before = text[: text.index(MARK)]
    line, column = before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1
    arguments = ["complete", f"{file}:{line}:{column}", "--json", "--set", "maxLatencyMs=60000"]
    arguments += ["--open", str(other)] if other is not None else []
    arguments += ["--seed", str(seed)] if seed is not None else []
    values: dict[str, Any] = json.loads(CliRunner().invoke(main, arguments).stdout)
    return {name: values[name] for name in ("text", "source", "reason")}


def by_server(engine: EngineClient, file: Path, text: str, other: Path | None, seed: int | None) -> dict[str, Any]:
    other_text = other.read_text() if other is not None else ""

    async def ask() -> dict[str, Any]:
        server = create_server(engine=engine, analysis=LocalAnalysis())
        connection = Connection(server)
        options = {"seed": seed, "candidates": 1, "firstLineMs": None, "maxLatencyMs": 60000}
        await connection.initialize({name: value for name, value in options.items() if value is not None})
        for path, content in ((other, other_text), (file, text.replace(MARK, ""))):
            if path is not None:
                item = {"uri": path.as_uri(), "languageId": language_of_path(path.name), "version": 1, "text": content}
                connection.notify("textDocument/didOpen", {"textDocument": item})
        before = text[: text.index(MARK)]
        params = {
            "textDocument": {"uri": file.as_uri()},
            "position": {"line": before.count("\n"), "character": len(before.rpartition("\n")[2])},
            "context": {"triggerKind": 1},
        }
        await until(lambda: engine.info is not None)
        answer = await connection.request("textDocument/inlineCompletion", params)
        last = server.session.records.last(file.as_uri())
        assert last is not None
        server.leave("the test is done")
        items = answer["items"]
        return {
            "text": items[0]["insertText"] if items else None,
            "source": last.source or None,
            "reason": last.reason or None,
        }

    return asyncio.run(ask())


def test_the_places_are_of_many_kinds() -> None:
    assert len({language_of_path(name) for name, _, _ in PLACES.values()}) == 6
    assert len(PLACES) * 2 * 2 == 60


@pytest.mark.parametrize("has_other", [False, True], ids=["alone", "another file open"])
@pytest.mark.parametrize("seed", [None, 3], ids=["no seed", "seed"])
@pytest.mark.parametrize("name", PLACES)
def test_both_offer_the_same(
    engine: EngineClient, tmp_path: Path, name: str, seed: int | None, has_other: bool
) -> None:
    file_name, text, other_text = PLACES[name]
    file, other = tmp_path / file_name, tmp_path / f"other{Path(file_name).suffix}"
    file.write_text(text.replace(MARK, ""))
    other.write_text(other_text)
    opened = other if has_other else None
    served = by_server(engine, file, text, opened, seed)
    assert by_command(file, text, opened, seed) == served


def test_matches_come_from_another_open_file_and_not_with_a_seed(engine: EngineClient, tmp_path: Path) -> None:
    file_name, text, other_text = PLACES["go, an assignment"]
    file, other = tmp_path / file_name, tmp_path / "other.go"
    file.write_text(text.replace(MARK, ""))
    other.write_text(other_text)
    assert by_server(engine, file, text, other, None)["source"] == "match"
    assert by_command(file, text, other, None)["source"] == "match"
    assert by_command(file, text, other, 3)["source"] != "match"
    assert by_command(file, text, None, None)["source"] != "match"
