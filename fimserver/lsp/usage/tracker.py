"""Follow one connection's completions: count what is offered, and what the user makes of it.

Acceptance moves the confidence that an automatic completion needs; the ledger is what ``fimserver stats`` shows.

Knows:  requests, completions.  Never: LSP types, the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fimserver.context.languages.names import find_language
from fimserver.datatypes import Completion, NoCompletion, Snapshot
from fimserver.lsp.records import Notes
from fimserver.lsp.usage.acceptance import FILE_NAME, Acceptance, Kind
from fimserver.lsp.usage.ledger import CHARACTERS_PER_TOKEN, FOLDER_NAME, Ledger


class Usage:
    """The counts of one connection; ``is_on`` says whether the user wants any."""

    def __init__(self, folder: Path, is_on: Callable[[], bool]) -> None:
        self.ledger = Ledger(folder / FOLDER_NAME, is_on)
        self.acceptance = Acceptance(folder / FILE_NAME, is_on, self._on_decided)

    def adjusted(self, confidence: float, kind: Kind) -> float | None:
        """Return a confidence corrected by the user's own counts of such offers; ``None`` if they do not count."""
        return self.acceptance.adjusted(confidence, kind)

    def know(self, completion: Completion, kind: Kind, confidence: float) -> None:
        """Record the confidence of a completion that may be shown."""
        self.acceptance.know(completion, kind, confidence)

    def on_request(self, snapshot: Snapshot) -> None:
        """Note the user's place: a completion shown elsewhere in the document was left."""
        self.acceptance.on_request(snapshot)

    def on_edit(self, uri: str, text: str) -> None:
        """Decide whether an edit of a document accepts or rejects a completion."""
        self.acceptance.on_edit(uri, text)

    def on_answer(self, source: str, total_ms: float) -> None:
        """Count a request answered with completions."""
        self.ledger.note_answer(source, total_ms)

    def on_refusal(self, refusal: NoCompletion) -> None:
        """Count a request answered with nothing."""
        self.ledger.note_empty(refusal.reason)

    def on_shown(self, snapshot: Snapshot, text: str, completions: Sequence[Completion], notes: Notes) -> None:
        """Follow completions that were sent for a document that now reads ``text``."""
        self.acceptance.show(replace(snapshot, text=text), *completions)
        self.ledger.note_offer(
            [completion.id for completion in completions],
            find_language(snapshot.language_id).id,
            str(notes.facts.get("hole", "")),
            notes.facts.get("characters_per_token", CHARACTERS_PER_TOKEN),
        )

    def forget(self, uri: str) -> None:
        """Drop a closed document; its completions stay undecided."""
        self.acceptance.forget(uri)

    def save(self) -> None:
        """Write all counts."""
        self.acceptance.save()
        self.ledger.save()

    def save_soon(self) -> None:
        """Write all counts, the larger file in a thread."""
        self.acceptance.save()
        self.ledger.save_soon()

    def reset(self) -> None:
        """Drop what is not written yet, and read the files again."""
        self.acceptance.forget_counts()
        self.ledger.forget()

    def _on_decided(self, completion: str, accepted: bool, characters: int) -> None:  # noqa: FBT001  the signature of a callback
        self.ledger.note_decision(completion, accepted=accepted, characters=characters)
