"""What one connection knows: its open documents, settings, recent completions, and why the last was empty.

Knows:  documents, texts.  Never: LSP messages, the engine.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fimserver.context.syntax import SyntaxTree, parse
from fimserver.lsp.convert import Document
from fimserver.settings import BY_WIRE_NAME, Settings, read_settings
from fimserver.text import Encoding
from fimserver.types import Completion, NoCompletion, Snapshot

_MAX_REMEMBERED = 8
_NO_OBJECT = 'the fimserver section of the settings is not an object; use {"maxLines": 8} and the like'


class Source(StrEnum):
    """Who may say what a setting is; whoever stands later wins."""

    CONFIG_FILE = "config.toml"
    INITIALIZATION = "initializationOptions"
    WORKSPACE = "workspace/configuration"
    CHANGE = "workspace/didChangeConfiguration"
    COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Remembered:
    """A completion and the text it belongs to."""

    uri: str
    before: str
    after: str
    completion: Completion


class CompletionCache:
    """The last completions: whoever types what was offered gets its rest without the model."""

    def __init__(self) -> None:
        self._entries: deque[Remembered] = deque(maxlen=_MAX_REMEMBERED)

    def remember(self, snapshot: Snapshot, completion: Completion) -> None:
        """Keep a completion of a snapshot."""
        before, after = snapshot.text[: snapshot.cursor], snapshot.text[snapshot.cursor :]
        self._entries.appendleft(Remembered(snapshot.uri, before, after, completion))

    def find(self, snapshot: Snapshot) -> Completion | None:
        """The rest of a completion whose beginning was typed since, or the whole where nothing was."""
        before, after = snapshot.text[: snapshot.cursor], snapshot.text[snapshot.cursor :]
        for entry in self._entries:
            if entry.uri != snapshot.uri or entry.after != after or not before.startswith(entry.before):
                continue
            typed = before[len(entry.before) :]
            middle = entry.completion.middle
            if len(typed) < len(middle) and middle.startswith(typed):
                return Completion(entry.completion.id, middle[len(typed) :], snapshot.cursor, snapshot.cursor)
        return None

    def forget(self, uri: str) -> None:
        """Drop what belongs to a closed document."""
        kept = [e for e in self._entries if e.uri != uri]
        self._entries = deque(kept, maxlen=_MAX_REMEMBERED)

    def clear(self) -> None:
        """Drop everything: what was decoded under other settings is not offered under these."""
        self._entries.clear()


@dataclass
class Session:
    """One connection's state. Only the server's event loop touches it."""

    encoding: Encoding = Encoding.UTF16
    settings: Settings = field(default_factory=Settings)
    layers: dict[Source, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    cache: CompletionCache = field(default_factory=CompletionCache)
    counters: Counter[str] = field(default_factory=Counter)
    explanations: dict[str, dict[str, Any]] = field(default_factory=dict)
    epoch: int = 0  # counts changes of settings and engines: what was decoded under others is not remembered
    lost: set[str] = field(default_factory=set)  # documents of which an edit could not be read
    _trees: dict[str, SyntaxTree] = field(default_factory=dict)

    def open(self, document: Document) -> None:
        """A document was opened."""
        self.documents[document.uri] = document
        self.lost.discard(document.uri)
        self._trees.pop(document.uri, None)

    def close(self, uri: str) -> None:
        """A document was closed."""
        self.documents.pop(uri, None)
        self.lost.discard(uri)
        self._trees.pop(uri, None)
        self.explanations.pop(uri, None)
        self.cache.forget(uri)

    def is_current(self, snapshot: Snapshot) -> bool:
        """Whether the document still reads as it did when the snapshot was taken."""
        document = self.documents.get(snapshot.uri)
        return document is not None and document.text == snapshot.text  # versions begin anew with each opening

    def tree_of(self, snapshot: Snapshot) -> SyntaxTree | None:
        """Syntax tree of a snapshot, made from the document's last one."""
        tree = parse(snapshot.text, snapshot.language_id, self._trees.get(snapshot.uri))
        if tree is not None:
            self._trees[snapshot.uri] = tree
        return tree

    def explain(self, snapshot: Snapshot, outcome: Completion | NoCompletion, source: str) -> None:
        """Keep what came of a request, without any text: for ``fimserver.explain``."""
        if isinstance(outcome, Completion):
            entry = {"outcome": "offered", "source": source, "id": outcome.id}
        else:
            entry = {"outcome": "empty", "reason": outcome.reason, "detail": outcome.detail}
        self.counters["offered" if isinstance(outcome, Completion) else f"empty.{outcome.reason}"] += 1
        if snapshot.uri not in self.documents:
            return
        self.explanations.pop(snapshot.uri, None)
        self.explanations[snapshot.uri] = {"version": snapshot.version, **entry}

    def initialize(self, options: object) -> list[str]:
        """Take ``initializationOptions``, bare or under ``fimserver``; one sentence for each that is wrong."""
        section = options.get("fimserver", options) if isinstance(options, dict) else {}
        if not isinstance(section, dict):
            return [_NO_OBJECT]
        return self.take(Source.INITIALIZATION, section)

    def configure(self, values: dict[str, Any], source: Source) -> list[str]:
        """Take an editor's settings, bare or under ``fimserver``, in the place of the last from there.

        What is not named, or null, is as other sources have it. An object with other tools' sections alone
        changes nothing.
        """
        section = values.get("fimserver", values)
        if section is None:
            section = {}
        if not isinstance(section, dict):
            return [_NO_OBJECT]
        if section is values and source is Source.CHANGE and not BY_WIRE_NAME.keys() & values.keys():
            return []
        return self.take(source, {name: value for name, value in section.items() if value is not None})

    def take(self, source: Source, values: dict[str, Any]) -> list[str]:
        """Put the values of a source in the place of its last; one sentence for each value that is wrong anywhere."""
        self.layers[source] = values
        settings, problems = Settings(), []
        for layer in Source:
            settings, more = read_settings(self.layers.get(layer, {}), settings)
            problems += more
        if settings != self.settings:
            self.settings = settings
            self.begin_epoch()
        return problems

    def begin_epoch(self) -> None:
        """Settings or engine changed: forget what was offered under the last."""
        self.epoch += 1
        self.cache.clear()
