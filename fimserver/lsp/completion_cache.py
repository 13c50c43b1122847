"""Answer from completions that were offered before, as long as the user types them.

    typed_since(snapshot, text)            -> the text typed at a snapshot's cursor, or None if something else changed
    rest_of(snapshot, completion, now)     -> what is left of a completion after its beginning was typed
    CompletionCache                        the last completions of all documents

Knows:  texts, completions.  Never: the engine, LSP.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from fimserver.datatypes import Completion, Snapshot

AROUND = 64
_MAX_REMEMBERED = 8
CLOSERS = ")]}>\"'`"


@dataclass(frozen=True, slots=True)
class Remembered:
    """Completions that were offered together, the best first, and the snapshot they belong to."""

    snapshot: Snapshot
    completions: tuple[Completion, ...]


def typed_since(snapshot: Snapshot, text: str) -> str | None:
    """Return what was typed at a snapshot's cursor to get ``text``; ``None`` if anything else changed."""
    old, cursor = snapshot.text, snapshot.cursor
    added = len(text) - len(old)
    end = cursor + added
    near = slice(max(0, cursor - AROUND), cursor)
    if added < 0 or text[near] != old[near] or text[end : end + AROUND] != old[cursor : cursor + AROUND]:
        return None
    same = text is old or (text.startswith(old[:cursor]) and text.endswith(old[cursor:]))
    return text[cursor:end] if same else None


def rest_of(snapshot: Snapshot, completion: Completion, now: Snapshot) -> Completion | None:
    """Return what is left of a snapshot's completion after its beginning was typed; ``None`` if other text was typed.

    White space alone is nothing that is left.

    Closing brackets that an editor added after the cursor are replaced, or kept if the rest ends with them.
    """
    typed_length = now.cursor - snapshot.cursor
    if typed_length < 0 or not completion.middle.startswith(now.text[snapshot.cursor : now.cursor]):
        return None
    inserted = typed_since(snapshot, now.text)
    if inserted is None or typed_length > len(inserted):
        return None
    typed, closers = inserted[:typed_length], inserted[typed_length:]
    middle = completion.middle
    if len(typed) == len(middle) or closers.strip(CLOSERS):
        return None
    rest, replaced = middle[len(typed) :], completion.replace_end - completion.replace_start
    if closers and rest.endswith(closers) and not replaced:
        rest = rest[: -len(closers)]
    elif closers:
        if not _holds_in_order(rest, closers):
            return None
        replaced += len(closers)
    return Completion(completion.id, rest, now.cursor, now.cursor + replaced) if rest.strip() else None


def rests_of(snapshot: Snapshot, completions: Iterable[Completion], now: Snapshot) -> list[Completion]:
    """Return what is left of each of a snapshot's completions that begins with what was typed since."""
    rests = (rest_of(snapshot, completion, now) for completion in completions)
    return [rest for rest in rests if rest is not None]


def _holds_in_order(text: str, characters: str) -> bool:
    remaining = iter(text)
    return all(character in remaining for character in characters)


class CompletionCache:
    """The last completions: a user who types one gets its rest without the model."""

    def __init__(self) -> None:
        self._entries: deque[Remembered] = deque(maxlen=_MAX_REMEMBERED)

    def remember(self, snapshot: Snapshot, *completions: Completion) -> None:
        """Keep the completions of a snapshot, the best first."""
        self._entries.appendleft(Remembered(snapshot, completions))

    def find(self, snapshot: Snapshot) -> list[Completion]:
        """Return the rests of completions whose beginning was typed since, or whole ones if nothing was; often none."""
        ours = (entry for entry in self._entries if entry.snapshot.uri == snapshot.uri)
        found = (rests_of(entry.snapshot, entry.completions, snapshot) for entry in ours)
        return next((rests for rests in found if rests), [])

    def count(self) -> int:
        """Return the number of cached answers."""
        return len(self._entries)

    def forget(self, uri: str) -> None:
        """Drop the answers for a closed document."""
        kept = [e for e in self._entries if e.snapshot.uri != uri]
        self._entries = deque(kept, maxlen=_MAX_REMEMBERED)

    def clear(self) -> None:
        """Drop everything: answers of other settings must not be offered."""
        self._entries.clear()
