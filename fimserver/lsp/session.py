"""What one connection knows: its open documents, settings, recent completions, and why the last was empty.

Knows:  documents, texts.  Never: LSP messages, the engine.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Any

from fimserver.context.ignored import IgnoreRules
from fimserver.context.languages import find_language
from fimserver.context.place import Place, TreeMemory, find_place
from fimserver.context.window import path_of
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.lsp.completion_cache import CompletionCache
from fimserver.lsp.convert import Document
from fimserver.lsp.debounce import AdaptiveDebounce
from fimserver.lsp.notebooks import Notebooks
from fimserver.lsp.records import Notes, Records
from fimserver.settings import BY_WIRE_NAME, ENGINE_SETTINGS, Settings, read_settings
from fimserver.text import Encoding, common_prefix_length, common_suffix_length

_MAX_DELETED = 6
_LEAST_DELETED = 8  # characters
_AROUND = 64
_MAX_OTHERS = 8
TRUST_OPTION = "workspaceTrusted"  # of initializationOptions
_NO_OBJECT = 'the fimserver section of the settings is not an object; use {"maxLines": 8} and the like'


class Source(StrEnum):
    """Who may say what a setting is; whoever stands later wins."""

    CONFIG_FILE = "config.toml"
    INITIALIZATION = "initializationOptions"
    WORKSPACE = "workspace/configuration"
    CHANGE = "workspace/didChangeConfiguration"
    COMMAND_LINE = "command line"


_EDITORS = (Source.INITIALIZATION, Source.WORKSPACE, Source.CHANGE)  # where a repository may have its say


@dataclass(frozen=True, slots=True)
class Deleted:
    """Text that was cut from ``start`` on, and what stands around it."""

    uri: str
    start: int
    before: str
    text: str
    after: str


@dataclass
class Session:
    """One connection's state. Only the server's event loop touches it."""

    encoding: Encoding = Encoding.UTF16
    settings: Settings = field(default_factory=Settings)
    layers: dict[Source, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    cache: CompletionCache = field(default_factory=CompletionCache)
    counters: Counter[str] = field(default_factory=Counter)
    notebooks: Notebooks = field(default_factory=Notebooks)
    records: Records = field(default_factory=Records)
    debounce: AdaptiveDebounce = field(default_factory=AdaptiveDebounce)
    find_model: Callable[[str], str | None] = lambda _model: None  # what to load for a name of an editor's settings
    refused_model: str | None = None  # the name that decides, as long as nobody agreed to it
    is_trusted: bool = True  # the workspace, as the editor says
    epoch: int = 0  # counts changes of settings and engines: what was decoded under others is not remembered
    lost: set[str] = field(default_factory=set)  # documents of which an edit could not be read
    snoozed_until: float = 0.0  # of time.monotonic
    _trees: dict[str, TreeMemory] = field(default_factory=dict)
    _ignored: IgnoreRules = field(default_factory=IgnoreRules)
    _deleted: deque[Deleted] = field(default_factory=lambda: deque(maxlen=_MAX_DELETED))

    def open(self, document: Document) -> None:
        """A document was opened."""
        self.documents[document.uri] = document
        self.lost.discard(document.uri)
        self._trees[document.uri] = TreeMemory()

    def change(self, document: Document) -> None:
        """A document has another text; it is now the one edited last."""
        old = self.documents.pop(document.uri)
        self.documents[document.uri] = document
        if len(document.text) < len(old.text):
            self._keep_deleted(old, document)

    def _keep_deleted(self, old: Document, new: Document) -> None:
        """Remember what was cut, with the text around it: it may be typed again elsewhere."""
        start = common_prefix_length(old.text, new.text)
        tail = common_suffix_length(old.text, new.text, min(len(old.text), len(new.text)) - start)
        end = len(old.text) - tail
        before, text, after = (
            old.text[max(0, start - _AROUND) : start],
            old.text[start:end],
            old.text[end : end + _AROUND],
        )
        last = self._deleted[0] if self._deleted else None
        if last is not None and last.uri == new.uri and last.start in {end, start}:  # backspace, or delete, held down
            self._deleted.popleft()
            text, after = text + last.text if last.start == end else last.text + text, last.after
        self._deleted.appendleft(Deleted(new.uri, start, before, text, after))

    def _refuse(self, uri: str) -> NoCompletion | None:
        """Why a document is nobody's business."""
        return self._ignored.refuse(uri, with_git=not self.settings.complete_ignored)

    def _is_hidden(self, uri: str) -> bool:
        """Whether a document's text must not be read for others."""
        return self._refuse(uri) is not None

    def other_documents(self, snapshot: Snapshot) -> list[tuple[str, str]]:
        """Path and text of other open documents in the same language, the one edited last first; no private ones."""
        language = find_language(snapshot.language_id)
        others = (document for document in reversed(self.documents.values()) if document.uri != snapshot.uri)
        fit = (
            other for other in others if find_language(other.language_id) is language and not self._is_hidden(other.uri)
        )
        return [(path_of(document.uri), document.text) for document in islice(fit, _MAX_OTHERS)]

    def with_cells_above(self, snapshot: Snapshot) -> Snapshot:
        """A notebook's cell behind the cells of its language above it, as one text; any other snapshot as it is."""
        language = find_language(snapshot.language_id)

        def read(uri: str) -> str | None:
            document = self.documents.get(uri)
            fits = document is not None and find_language(document.language_id) is language
            return document.text if document is not None and fits and not self._is_hidden(uri) else None

        above = self.notebooks.text_above(snapshot.uri, read)
        if not above:
            return snapshot
        return replace(snapshot, text=above + snapshot.text, cursor=len(above) + snapshot.cursor)

    def other_texts(self, snapshot: Snapshot) -> list[str]:
        """Where else to look for guesses: what was deleted, then other documents."""
        deleted = [
            f"{d.before}{d.text}{d.after}"
            for d in self._deleted
            if len(d.text) >= _LEAST_DELETED and not self._is_hidden(d.uri)
        ]
        return [*deleted, *(text for _, text in self.other_documents(snapshot))]

    def snoozed_minutes(self) -> int:
        """Minutes until automatic completions come again, rounded up."""
        return max(0, math.ceil((self.snoozed_until - time.monotonic()) / 60))

    def learns_from_use(self) -> bool:
        """Whether the person's own counts may matter: not under a seed, with which the text alone decides."""
        return self.settings.learn_from_use and self.settings.seed is None

    def close(self, uri: str) -> None:
        """A document was closed."""
        self.documents.pop(uri, None)
        self.lost.discard(uri)
        self._trees.pop(uri, None)
        self.records.forget(uri)
        self.cache.forget(uri)

    def is_current(self, snapshot: Snapshot) -> bool:
        """Whether the document still reads as it did when the snapshot was taken."""
        document = self.documents.get(snapshot.uri)
        return document is not None and document.text == snapshot.text  # versions begin anew with each opening

    def find_place(self, snapshot: Snapshot, *, invoked: bool) -> Place | NoCompletion:
        """What may be filled at a snapshot's cursor; the syntax tree is made from the document's last one."""
        if (refusal := self._refuse(snapshot.uri)) is not None:
            return refusal
        document = self.documents.get(snapshot.uri)
        memory = self._trees.setdefault(snapshot.uri, TreeMemory())
        writable = document is None or document.writable
        return find_place(snapshot, self.settings, memory, invoked=invoked, writable=writable)

    def record(
        self, snapshot: Snapshot, outcome: Completion | NoCompletion, source: str = "", notes: Notes | None = None
    ) -> None:
        """Keep what came of a request, without any text: for ``fimserver.cli.explain``."""
        self.counters["offered" if isinstance(outcome, Completion) else f"empty.{outcome.reason}"] += 1
        if snapshot.uri in self.documents:
            self.records.add(snapshot, outcome, source, notes or Notes())

    def initialize(self, options: object) -> list[str]:
        """Take ``initializationOptions``, bare or under ``fimserver``; one sentence for each that is wrong."""
        section = options.get("fimserver", options) if isinstance(options, dict) else {}
        said = [part[TRUST_OPTION] for part in (options, section) if isinstance(part, dict) and TRUST_OPTION in part]
        self.is_trusted = all(trust is True for trust in said)
        if not isinstance(section, dict):
            return [_NO_OBJECT]
        return self.take(Source.INITIALIZATION, {key: section[key] for key in section if key != TRUST_OPTION})

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
        return self.reread()

    def reread(self) -> list[str]:
        """Read all sources anew: what they may say can have changed; one sentence for each value that is wrong."""
        settings, problems = Settings(), []
        self.refused_model = None
        for layer in Source:
            said = self.layers.get(layer, {})
            if "model" in said:
                self.refused_model = None  # what was said before decides no more
            if layer in _EDITORS:
                said = self._allowed(said)
            settings, more = read_settings(said, settings)
            problems += more
        if settings != self.settings:
            self.settings = settings
            self.begin_epoch()
        return problems

    def _allowed(self, said: dict[str, Any]) -> dict[str, Any]:
        """An editor's settings without those that a repository must not decide alone."""
        if not self.is_trusted:
            return {name: value for name, value in said.items() if name not in ENGINE_SETTINGS}
        model = said.get("model")
        if not isinstance(model, str) or not model:
            return said  # which is no model, as who reads it will say
        if (folder := self.find_model(model)) is not None:
            return {**said, "model": folder}
        self.refused_model = model
        return {name: value for name, value in said.items() if name != "model"}

    def begin_epoch(self) -> None:
        """Settings or engine changed: forget what was offered under the last."""
        self.epoch += 1
        self.cache.clear()
