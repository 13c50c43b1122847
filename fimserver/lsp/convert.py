"""Between LSP's types and ours: positions to offsets, snapshots, items. Pure functions.

Knows:  LSP types, encodings, texts.  Never: connections, the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lsprotocol import types as lsp

from fimserver.text import Encoding, LineIndex
from fimserver.text import replace as replace_text
from fimserver.types import Completion, Snapshot

ACCEPT_COMMAND = "fimserver.didAcceptCompletion"


@dataclass(frozen=True, slots=True)
class Document:
    """One open document as the editor last described it."""

    uri: str
    language_id: str
    version: int
    text: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The popup menu's selected item: ``text`` would replace ``[start, end)`` of the document."""

    start: int
    end: int
    text: str


def take_snapshot(document: Document, position: lsp.Position, encoding: Encoding) -> Snapshot:
    """The document with the cursor at ``position``. Raises ``PositionError``."""
    cursor = LineIndex(document.text).to_offset(position.line, position.character, encoding)
    return Snapshot(document.uri, document.version, document.language_id, document.text, cursor)


def apply_changes(
    document: Document,
    changes: Sequence[lsp.TextDocumentContentChangeEvent],
    *,
    version: int,
    encoding: Encoding,
) -> Document:
    """The document after ``changes``, in order; positions that do not exist mean the nearest that does."""
    index = LineIndex(document.text)
    for change in changes:
        if isinstance(change, lsp.TextDocumentContentChangePartial):
            start = index.to_nearest_offset(change.range.start.line, change.range.start.character, encoding)
            end = index.to_nearest_offset(change.range.end.line, change.range.end.character, encoding)
            index = index.replaced(start, end, change.text)
        else:
            index = LineIndex(change.text)
    return replace(document, text=index.text, version=version)


def find_selection(snapshot: Snapshot, info: lsp.SelectedCompletionInfo | None, encoding: Encoding) -> Selection | None:
    """The selected item, if there is one. Raises ``PositionError``."""
    if info is None:
        return None
    index = LineIndex(snapshot.text)
    start = index.to_offset(info.range.start.line, info.range.start.character, encoding)
    end = index.to_offset(info.range.end.line, info.range.end.character, encoding)
    return Selection(start, max(start, end), info.text)


def with_selection(snapshot: Snapshot, selection: Selection | None) -> Snapshot:
    """The snapshot as it would be if the selected item had been accepted."""
    if selection is None:
        return snapshot
    text = replace_text(snapshot.text, selection.start, selection.end, selection.text)
    return replace(snapshot, text=text, cursor=selection.start + len(selection.text))


def to_inline_items(
    completion: Completion, snapshot: Snapshot, encoding: Encoding, selection: Selection | None = None
) -> list[lsp.InlineCompletionItem]:
    """LSP items for a completion of ``snapshot``, always with a range; ``snapshot`` is without ``selection``.

    Beside a selected item the text begins with that item, since the editor shows only what extends it.
    """
    if selection is None:
        start, end, text = completion.replace_start, completion.replace_end, completion.middle
    else:
        start, end, text = selection.start, selection.end, selection.text + completion.middle
    index = LineIndex(snapshot.text)
    edit = lsp.Range(lsp.Position(*index.to_position(start, encoding)), lsp.Position(*index.to_position(end, encoding)))
    command = lsp.Command("Completion accepted", ACCEPT_COMMAND, arguments=[completion.id])
    return [lsp.InlineCompletionItem(text, range=edit, command=command)]
