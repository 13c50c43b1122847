"""Data-driven cases: a source with a cursor mark, and the expected result.

A file holds cases as ``=== name [key=value ...]``, then the source, then sections that begin with ``--- title``;
the last section is the expected result. ``pytest --update`` writes the actual result instead of comparing.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fimserver.datatypes import NoCompletion, Snapshot
from fimserver.settings import Settings, parse_settings

MARK = "\u25ae"
DATA = Path(__file__).parents[1] / "data"


@dataclass
class Case:
    file: str
    name: str
    options: dict[str, Any]
    sections: list[tuple[str, str]]

    @property
    def snapshot(self) -> Snapshot:
        source = self.sections[0][1]
        if "crlf" in self.options:
            source = source.replace("\n", "\r\n")
        assert source.count(MARK) == 1, self.name
        cursor = source.index(MARK)
        language = self.options.get("language", "python")
        return Snapshot("file:///case.py", 1, language, source.replace(MARK, ""), cursor)

    @property
    def settings(self) -> Settings:
        others = {"language", "crlf", "limited", "match"}
        return parse_settings({k: v for k, v in self.options.items() if k not in others})

    def section(self, title: str) -> str:
        return dict(self.sections)[title]


def read_cases(file: str) -> list[Case]:
    cases = []
    for block in re.split(r"^=== ", (DATA / file).read_bytes().decode(), flags=re.MULTILINE)[1:]:
        header, rest = block.split("\n", 1)
        match = re.fullmatch(r"(.*?)(?: \[(.*)\])?", header)
        assert match
        options: dict[str, Any] = {}
        for word in (match[2] or "").split():
            key, _, value = word.partition("=")
            try:
                options[key] = json.loads(value)
            except ValueError:
                options[key] = value
        parts = re.split(r"^--- (\w+)\n", rest, flags=re.MULTILINE)
        titles, bodies = ["source", *parts[1::2]], parts[::2]
        sections = list(zip(titles, (b.removesuffix("\n") for b in bodies), strict=True))
        cases.append(Case(file, match[1], options, sections))
    return cases


def parametrize(*files: str) -> pytest.MarkDecorator:
    cases = [case for file in files for case in read_cases(file)]
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def check(case: Case, actual: str, request: pytest.FixtureRequest) -> None:
    title, expected = case.sections[-1]
    if actual != expected and request.config.getoption("--update"):
        path = DATA / case.file
        text = path.read_text(encoding="utf-8")
        header = re.search(rf"^=== {re.escape(case.name)}(?: \[.*\])?$", text, re.MULTILINE)
        assert header
        start = header.start()
        place = text.index(f"--- {title}\n", start) + len(f"--- {title}\n")
        assert text.startswith(expected, place)
        rest = text[place + len(expected) :]
        ending = "" if rest.startswith("\n") or not rest else "\n"  # nothing was expected, not even an empty line
        path.write_text(text[:place] + actual + ending + rest, encoding="utf-8")
        return
    assert actual == expected


def show_refusal(refusal: NoCompletion) -> str:
    return f"! {refusal.reason}"
