"""Convert between LSP's types and ours: positions, snapshots, items. Pure functions.

Knows:  LSP types, encodings, texts.  Never: connections, the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lsprotocol import types as lsp

from fimserver.datatypes import Completion, Snapshot
from fimserver.lsp.documents import Document, Edit
from fimserver.text import Encoding, LineIndex
from fimserver.text import replace as replace_text

ACCEPT_COMMAND = "fimserver.didAcceptCompletion"
_LONGEST_LABEL = 60


@dataclass(frozen=True, slots=True)
class Selection:
    """The popup menu's selected item: ``text`` would replace ``[start, end)`` of the document."""

    start: int
    end: int
    text: str


def take_snapshot(document: Document, position: lsp.Position, encoding: Encoding) -> Snapshot:
    """Return the document with the cursor at ``position``. Raises ``PositionError``."""
    cursor = document.index.to_offset(position.line, position.character, encoding)
    return Snapshot(document.uri, document.version, document.language_id, document.text, cursor)


def to_edits(changes: Sequence[lsp.TextDocumentContentChangeEvent]) -> list[Edit]:
    """Return LSP's content changes as edits of the document store."""
    edits: list[Edit] = []
    for change in changes:
        if isinstance(change, lsp.TextDocumentContentChangePartial):
            start, end = change.range.start, change.range.end
            edits.append((((start.line, start.character), (end.line, end.character)), change.text))
        else:
            edits.append((None, change.text))
    return edits


def find_selection(index: LineIndex, info: lsp.SelectedCompletionInfo | None, encoding: Encoding) -> Selection | None:
    """Return the selected item, if there is one. Raises ``PositionError``."""
    if info is None:
        return None
    start = index.to_offset(info.range.start.line, info.range.start.character, encoding)
    end = index.to_offset(info.range.end.line, info.range.end.character, encoding)
    return Selection(start, max(start, end), info.text)


def with_selection(snapshot: Snapshot, selection: Selection | None) -> Snapshot:
    """Return the snapshot as it would be if the selected item had been accepted."""
    if selection is None:
        return snapshot
    text = replace_text(snapshot.text, selection.start, selection.end, selection.text)
    return replace(snapshot, text=text, cursor=selection.start + len(selection.text))


def to_inline_items(
    completions: Sequence[Completion], index: LineIndex, encoding: Encoding, selection: Selection | None = None
) -> list[lsp.InlineCompletionItem]:
    """Return an LSP item for each completion, always with a range; ``index`` is the document's, without ``selection``.

    With a selected item the text begins with that item, since the editor shows only what extends it.
    """
    return [_to_inline_item(completion, index, encoding, selection) for completion in completions]


def _to_inline_item(
    completion: Completion, index: LineIndex, encoding: Encoding, selection: Selection | None
) -> lsp.InlineCompletionItem:
    start, end, text = completion.replace_start, completion.replace_end, completion.middle
    if selection is not None:
        end = selection.end + completion.replace_end - completion.replace_start
        start, text = selection.start, selection.text + text
    edit = _to_range(index, start, end, encoding)
    return lsp.InlineCompletionItem(text, range=edit, command=_accept_command(completion))


def to_menu_items(completion: Completion, index: LineIndex, encoding: Encoding) -> list[lsp.CompletionItem]:
    """Return a completion as menu items that continue the word before the cursor, which menus filter by."""
    start = completion.replace_start
    while start and (index.text[start - 1].isalnum() or index.text[start - 1] == "_"):
        start -= 1
    word = index.text[start : completion.replace_start]
    text = word + completion.middle
    label = text.strip().splitlines()[0]
    item = lsp.CompletionItem(
        label=label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "\u2026",
        kind=lsp.CompletionItemKind.Text,
        detail="fimserver",
        documentation=text if "\n" in text.strip() or len(label) > _LONGEST_LABEL else None,
        filter_text=text,
        sort_text=" ",  # sorts before letters and digits; a NUL ends JSON in Emacs
        preselect=True,
        insert_text_format=lsp.InsertTextFormat.PlainText,
        text_edit=lsp.TextEdit(_to_range(index, start, completion.replace_end, encoding), text),
        command=_accept_command(completion),
    )
    return [item]


def _to_range(index: LineIndex, start: int, end: int, encoding: Encoding) -> lsp.Range:
    return lsp.Range(lsp.Position(*index.to_position(start, encoding)), lsp.Position(*index.to_position(end, encoding)))


def _accept_command(completion: Completion) -> lsp.Command:
    return lsp.Command("Completion accepted", ACCEPT_COMMAND, arguments=[completion.id])
