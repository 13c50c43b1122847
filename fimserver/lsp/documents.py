"""Keep the open documents and notebooks of one editor: the relay and the server use the same store.

    Document        one open document, unchangeable; ``edited`` returns the next version
    DocumentStore   all of one editor, the last edited last, and which cells each notebook has
    parse_edits     LSP's content changes, as JSON, to edits
    prepare_index   the lines of a large text, ahead of its use

Positions are line and character in ``DocumentStore.encoding``; one that does not exist means the nearest that does.
Line ends are LSP's (``text.py``), which the standard library and pygls do not share.

Standard library only, and without dataclasses: every editor window starts a relay that imports this.

Knows:  texts, positions, cells.  Never: LSP types, connections, what a document is used for.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from fimserver.text import Encoding, LineIndex

Place = tuple[int, int]  # line, character
Edit = tuple[tuple[Place, Place] | None, str]  # the range that a text replaces; None replaces everything


class Document:
    """One open document as the editor last described it. ``index`` holds its text."""

    __slots__ = ("index", "language_id", "uri", "version")

    def __init__(self, uri: str, language_id: str, version: int, index: LineIndex) -> None:
        self.uri, self.language_id, self.version, self.index = uri, language_id, version, index

    @property
    def text(self) -> str:
        """Return the whole text."""
        return self.index.text

    def edited(self, edits: Iterable[Edit], *, version: int, encoding: Encoding) -> "Document":
        """Return the document after ``edits``, in order."""
        index = self.index
        for place, text in edits:
            if place is None:
                index = index_of(text)
            else:
                start, end = (index.to_nearest_offset(line, character, encoding) for line, character in place)
                index = index.replaced(start, end, text)
        return Document(self.uri, self.language_id, version, index)


_MOST_PREPARED = 4
_prepared: dict[int, LineIndex] = {}  # by the identity of the text, until it is used


def prepare_index(text: str) -> None:
    """Build the index of a text ahead of its use, in any thread: of 240,000 lines it takes 20 ms."""
    index = LineIndex(text)
    while len(_prepared) >= _MOST_PREPARED:  # of documents that were not open
        _prepared.pop(next(iter(_prepared)), None)
    _prepared[id(text)] = index


def index_of(text: str) -> LineIndex:
    """Return the index of a text, the prepared one if there is one."""
    prepared = _prepared.pop(id(text), None)
    return prepared if prepared is not None and prepared.text is text else LineIndex(text)


class DocumentStore:
    """The open documents and notebooks of one editor. Cells of notebooks are documents like all others."""

    def __init__(self) -> None:
        self.encoding = Encoding.UTF16  # unit of columns in edits
        self.documents: dict[str, Document] = {}
        self.notebooks: dict[str, dict[str, Any]] = {}  # as opened, with their current cells

    def open(self, document: Document) -> None:
        """Add a document, in place of an earlier one of the same URI."""
        self.documents.pop(document.uri, None)
        self.documents[document.uri] = document

    def change(self, uri: str, edits: Iterable[Edit], version: int | None = None) -> tuple[Document, Document]:
        """Apply edits; return the document before and after them. Raises ``KeyError`` if it is not open."""
        old = self.documents[uri]
        new = old.edited(edits, version=old.version if version is None else version, encoding=self.encoding)
        self.open(new)  # moves it to the end: the last edited
        return old, new

    def close(self, uri: str) -> None:
        """Drop a document, if it is open."""
        self.documents.pop(uri, None)

    def open_notebook(self, notebook: Mapping[str, Any]) -> None:
        """Add a notebook: ``uri``, ``cells`` (each with its ``document``), and what else a client must get."""
        self.notebooks[notebook["uri"]] = {**notebook, "cells": _to_cells(notebook["cells"])}

    def change_cells(self, uri: str, start: int, delete_count: int, cells: Iterable[Mapping[str, Any]]) -> None:
        """Replace ``delete_count`` cells of a notebook from ``start`` on. Raises ``KeyError`` if it is not open."""
        self.notebooks[uri]["cells"][start : start + delete_count] = _to_cells(cells)

    def close_notebook(self, uri: str) -> list[str]:
        """Drop a notebook; return the URIs of its cells, which the caller closes."""
        return [cell["document"] for cell in self.notebooks.pop(uri, {"cells": []})["cells"]]

    def cells_above(self, uri: str) -> list[str]:
        """Return the URIs of the cells above a notebook's cell; empty for any other document."""
        for notebook in self.notebooks.values():
            uris = [str(cell["document"]) for cell in notebook["cells"]]
            if uri in uris:
                return uris[: uris.index(uri)]
        return []


def parse_edits(changes: Iterable[Mapping[str, Any]]) -> list[Edit]:
    """Return LSP's content changes as edits. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
    edits: list[Edit] = []
    for change in changes:
        place = change.get("range")
        ends = None if place is None else (_to_place(place["start"]), _to_place(place["end"]))
        edits.append((ends, str(change["text"])))
    return edits


def _to_place(position: Mapping[str, Any]) -> Place:
    return int(position["line"]), int(position["character"])


def _to_cells(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**cell, "document": str(cell["document"])} for cell in cells]
