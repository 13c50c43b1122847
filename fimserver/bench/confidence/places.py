"""Draw places at which an editor asks automatically: after a typed character, at the end of a word, on a new line.

    draw_places(texts, limit)   -> the same places of a folder's files each time
    draw_jumps(texts, limit)    -> new lines after return, raise and their like, where nothing is right
    Asked.at_the_end            -> the place in a file that is being written: nothing is below its line

A place is a file without the rest of one line; that rest is what the user would have typed.

Knows:  texts.  Never: models, LSP.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from fimserver.context.languages.names import find_language, language_of_path
from fimserver.context.scan import scan
from fimserver.datatypes import Snapshot
from fimserver.text import leading_whitespace

_SHORTEST_LINE = 8
_DRAW_SEED = 23
_WORD = re.compile(r"\w+")
_TRIES = 50  # for each place


class Trigger(StrEnum):
    """The key after which the editor asks."""

    CHARACTER = "character"
    WORD = "end of a word"
    LINE = "new line"


@dataclass(frozen=True, slots=True)
class Asked:
    """A place in a file, and the rest of its line."""

    name: str
    snapshot: Snapshot
    rest: str
    trigger: Trigger

    def is_right(self, text: str) -> bool:
        """Return whether a text is the rest of the line, except for spaces at its ends."""
        return text.strip() == self.rest.strip()

    def begins_right(self, text: str) -> bool:
        """Return whether the first line of a text that is not empty is the rest of the line."""
        return self.is_right(text.strip().partition("\n")[0])

    def at_the_end(self) -> "Asked":
        """Return the place without the lines below."""
        text = self.snapshot.text[: self.snapshot.cursor] + "\n"
        return replace(self, snapshot=replace(self.snapshot, text=text))


def draw_places(texts: Mapping[str, str], limit: int, seed: int = _DRAW_SEED) -> Iterator[Asked]:
    """Yield places, a third of each trigger; fewer than ``limit`` only if the files have hardly any code."""
    rng, names, triggers = random.Random(seed), list(texts), list(Trigger)
    number = 0
    for _ in range(limit * _TRIES):
        if number == limit:
            return
        name = rng.choice(names)
        if (place := _draw(name, texts[name], triggers[number % len(triggers)], rng)) is not None:
            number += 1
            yield place


def draw_jumps(texts: Mapping[str, str], limit: int, seed: int = _DRAW_SEED) -> list[Asked]:
    """Return at most ``limit`` new lines below a jump of one line, at its depth."""
    found = []
    for name, text in texts.items():
        language_id = language_of_path(name)
        language = find_language(language_id)
        words = "|".join(language.jumps.split()) or "(?!)"
        for match in re.finditer(rf"^[ \t]*(?:{words})\b[^:=\n]*$", text, re.MULTILINE):
            state = scan(match[0], language)
            if state.brackets or state.quote or state.unmatched is not None:
                continue
            above = f"{text[: match.end()]}\n{leading_whitespace(match[0])}"
            snapshot = Snapshot(f"file:///{name}", 0, language_id, above + text[match.end() :], len(above))
            found.append(Asked(name, snapshot, "", Trigger.LINE))
    return random.Random(seed).sample(found, min(limit, len(found)))


def _draw(name: str, text: str, trigger: Trigger, rng: random.Random) -> Asked | None:
    language_id = language_of_path(name)
    language = find_language(language_id)
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    code = lines[number].strip()
    marks = (*language.line_comments, *(begin for begin, _ in language.block_comments), "*", '"""', "'''")
    if len(code) < _SHORTEST_LINE or code.startswith(marks):
        return None
    ends = [match.end() for match in _WORD.finditer(code) if match.end() < len(code)]
    if trigger is Trigger.WORD and not ends:
        return None
    column = 0
    if trigger is not Trigger.LINE:
        column = rng.choice(ends) if trigger is Trigger.WORD else rng.randrange(1, len(code) - 1)
    begin = sum(len(line) + 1 for line in lines[:number])
    start = begin + len(lines[number]) - len(lines[number].lstrip()) + column
    end = begin + len(lines[number])
    state = scan(text[:start], language)
    if state.in_comment or (state.quote and "\n" in text[state.text_start : start]):
        return None
    snapshot = Snapshot(f"file:///{name}", 0, language_id, text[:start] + text[end:], start)
    return Asked(name, snapshot, text[start:end], trigger)
