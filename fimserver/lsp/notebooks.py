"""Notebooks: which cells one has, in order; their texts are documents like all others.

A cell is completed as if the cells of its language above it stood before it in one file.

Knows:  LSP's notebook messages.  Never: how a cell is completed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from lsprotocol import types as lsp

_SEPARATOR = "\n"


@dataclass(slots=True)
class Notebooks:
    """The cells of each open notebook, by their documents' URIs."""

    _cells: dict[str, list[str]] = field(default_factory=dict)

    def open(self, notebook: lsp.NotebookDocument) -> None:
        """A notebook was opened."""
        self._cells[notebook.uri] = [cell.document for cell in notebook.cells]

    def change(self, uri: str, array: lsp.NotebookCellArrayChange) -> None:
        """Cells were added, taken away or moved."""
        cells = self._cells.setdefault(uri, [])
        cells[array.start : array.start + array.delete_count] = [cell.document for cell in array.cells or ()]

    def close(self, uri: str) -> list[str]:
        """A notebook was closed; its cells."""
        return self._cells.pop(uri, [])

    def text_above(self, uri: str, read: Callable[[str], str | None]) -> str:
        """The texts of the cells above one, each ending in a line end; empty for what is no cell.

        ``read`` gives a cell's text, and ``None`` for one that is not to be read: of another language, or prose.
        """
        for cells in self._cells.values():
            if uri in cells:
                texts = [text for cell in cells[: cells.index(uri)] if (text := read(cell))]
                return "".join(text if text.endswith(_SEPARATOR) else text + _SEPARATOR for text in texts)
        return ""
