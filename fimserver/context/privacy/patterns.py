"""Match the patterns of ignore files, in the syntax of .gitignore, in a time that does not depend on luck.

    IgnorePatterns   the patterns of one file: what do they say about a path?
    Work             what matching has cost so far, with a limit

A pattern is matched part by part, and a part from one star to the next, never with a search that begins over: its time
grows with the length of the name times the length of the pattern. Libraries translate patterns into regular
expressions, where every further star multiplies the time by the length of the name.

Knows:   texts.  Never: files.
Raises:  ``TooCostlyError``.
Source:  gitignore(5); tests/context/test_ignored.py compares with git.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_MOST_WILDCARDS = 5_000  # patterns of one file whose last part is not a plain name: each is tried for each folder
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-+@=,~")
_CLASSES = {
    "alpha": "a-zA-Z", "digit": "0-9", "alnum": "a-zA-Z0-9", "upper": "A-Z", "lower": "a-z", "xdigit": "0-9a-fA-F",
    "space": "\t-\r - ", "blank": "\t-\t - ", "punct": "!-/:-@[-`{-~", "cntrl": "\0-\x1f\x7f-\x7f",
    "graph": "!-~", "print": " -~",
}  # fmt: skip
_ANY_FOLDERS = "**"
_ESCAPED_SLASH = re.compile(r"(?<=[^\\])\\/")
_MOST_NAMES = 12  # of a pattern with such stars: each doubles the number of patterns
# Costs, in about nanoseconds.
_A_TRIAL, _A_CHARACTER = 500, 100


def to_bytes(text: str) -> str:
    """Return a text with a character for each of its bytes in UTF-8: git compares bytes."""
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("latin-1")


class TooCostlyError(Exception):
    """Matching would take too long."""


@dataclass(slots=True)
class Work:
    """What is left of the work that one answer may take, in about nanoseconds."""

    left: int = 40_000_000

    def spend(self, cost: int) -> None:
        """Take a cost off. Raises ``TooCostlyError`` when nothing is left."""
        self.left -= cost
        if self.left < 0:
            raise TooCostlyError


@dataclass(frozen=True, slots=True)
class _Set:
    """One character of several: ``[a-z]``, or with ``None`` any character: ``?``."""

    ranges: tuple[tuple[str, str], ...] | None
    is_negated: bool = False

    def holds(self, character: str) -> bool:
        if self.ranges is None:
            return True
        return any(first <= character <= last for first, last in self.ranges) is not self.is_negated


_Segment = str | tuple[str | _Set, ...]  # of characters that follow one another; a text if all are plain


def _fits(segment: _Segment, name: str, at: int) -> bool:
    if isinstance(segment, str):
        return name.startswith(segment, at)
    return all(
        one == character if isinstance(one, str) else one.holds(character)
        for one, character in zip(segment, name[at : at + len(segment)], strict=True)
    )


def _find(segment: _Segment, name: str, start: int, end: int) -> int:
    """Return where a segment is found first in ``[start, end)`` of a name, or -1."""
    if isinstance(segment, str):
        return name.find(segment, start, end)
    return next((at for at in range(start, end - len(segment) + 1) if _fits(segment, name, at)), -1)


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a path, with segments between its stars; one segment has to be the whole name."""

    segments: tuple[_Segment, ...]
    length: int  # of all segments
    is_simple: bool  # all segments are texts

    @classmethod
    def of(cls, *segments: _Segment) -> "_Part":
        """Return the part with these segments."""
        return cls(segments, sum(map(len, segments)), all(isinstance(segment, str) for segment in segments))

    @property
    def name(self) -> str | None:
        """Return the only name that matches; ``None`` if there are more."""
        return self.segments[0] if len(self.segments) == 1 and isinstance(self.segments[0], str) else None

    def matches(self, name: str, work: Work) -> bool:
        """Return whether a name matches. Raises ``TooCostlyError``."""
        if self.length > len(name):
            work.spend(_A_TRIAL)
            return False
        work.spend(_A_TRIAL * len(self.segments) + (0 if self.is_simple else _A_CHARACTER * self.length * len(name)))
        first, *rest = self.segments
        if not rest:
            return self.length == len(name) and _fits(first, name, 0)
        *between, last = rest
        at, end = len(first), len(name) - len(last)
        if not (_fits(first, name, 0) and _fits(last, name, end)):
            return False
        for segment in between:
            found = _find(segment, name, at, end)
            if found < 0:
                return False
            at = found + len(segment)
        return at <= end


_ANY = _Part.of("", "")  # *


@dataclass(frozen=True, slots=True)
class _Pattern:
    """One line: the parts of paths that it matches, ``None`` for any number of folders."""

    order: int
    parts: tuple[_Part | None, ...]
    ignores: bool
    for_folders: bool

    def matches(self, path: Sequence[str], work: Work) -> bool:
        """Return whether a path below the ignore file matches: the last ``**`` takes one more folder if it has to."""
        at = part = 0
        retry: tuple[int, int] | None = None
        while at < len(path):
            if part < len(self.parts) and (wanted := self.parts[part]) is None:
                part += 1
                retry = part, at
            elif part < len(self.parts) and wanted is not None and wanted.matches(path[at], work):
                part, at = part + 1, at + 1
            elif retry is not None:
                part, at = retry[0], retry[1] + 1
                retry = part, at
            else:
                return False
        return all(rest is None for rest in self.parts[part:])


@dataclass(slots=True)
class IgnorePatterns:
    """The patterns of one ignore file."""

    _by_name: dict[str, list[_Pattern]] = field(default_factory=dict)  # whose last part is a plain name
    _others: list[_Pattern] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> "IgnorePatterns":
        """Return the patterns in a file's text; lines that git cannot apply are skipped. Raises ``TooCostlyError``."""
        self = cls()
        for order, line in enumerate(to_bytes(text).split("\n")):
            for pattern in _parse_line(order, line.removesuffix("\r")):
                last = pattern.parts[-1]
                if last is not None and last.name is not None:
                    self._by_name.setdefault(last.name, []).append(pattern)
                else:
                    self._others.append(pattern)
                    if len(self._others) > _MOST_WILDCARDS:
                        raise TooCostlyError
        return self

    def decide(self, path: Sequence[str], *, is_folder: bool, work: Work) -> bool | None:
        """Return whether the patterns ignore a path (parts below the ignore file's folder) or re-include it.

        ``None`` if they say neither. The last match wins. Raises ``TooCostlyError``.
        """
        best: _Pattern | None = None
        path = [part if part.isascii() else to_bytes(part) for part in path]
        for patterns in (self._by_name.get(path[-1], ()), self._others):
            for pattern in reversed(patterns):
                if best is not None and pattern.order < best.order:
                    break
                if (is_folder or not pattern.for_folders) and pattern.matches(path, work):
                    best = pattern
                    break
        return best.ignores if best is not None else None


def _parse_line(order: int, line: str) -> list[_Pattern]:
    """Return the patterns of a line; none for a comment, an empty line and one that matches nothing."""
    if line and _PLAIN.issuperset(line):  # most lines
        return [_Pattern(order, (None, _Part.of(line)), ignores=True, for_folders=False)]
    if line.startswith("#"):
        return []
    ignores = not line.startswith("!")
    text = _without_spaces(line if ignores else line[1:])
    for_folders = text.endswith("/")
    text = _ESCAPED_SLASH.sub("/", text.removesuffix("/"))
    if not text:
        return []
    names = text.removeprefix("/").split("/")
    is_anchored = "/" in text
    found = _parse_names(names, is_anchored=is_anchored)
    return [_Pattern(order, parts, ignores=ignores, for_folders=for_folders) for parts in found]


def _parse_names(names: list[str], *, is_anchored: bool) -> list[tuple[_Part | None, ...]]:
    """Return the parts of a pattern; several lists of them for ``a**/b``, whose stars git lets match slashes."""
    for at, name in enumerate(names[:-1]):
        if name.endswith(_ANY_FOLDERS) and (begin := name.rstrip("*")) and len(names) < _MOST_NAMES:
            before, follows, after = names[:at], names[at + 1], names[at + 2 :]
            return [
                *_parse_names([*before, f"{begin}{follows}", *after], is_anchored=is_anchored),
                *_parse_names([*before, f"{begin}*", _ANY_FOLDERS, follows, *after], is_anchored=True),
            ]
    parts: list[_Part | None] = [] if is_anchored else [None]
    for name in names:
        if len(name) > 1 and not name.strip("*") and is_anchored:
            if not parts or parts[-1] is not None:
                parts.append(None)
        elif (part := _parse_part(name)) is not None:
            parts.append(part)
        else:
            return []
    if parts[-1] is None:  # "folder/**" matches what is in it
        parts.append(_ANY)
    return [tuple(parts)]


def _without_spaces(line: str) -> str:
    """Return a line without the spaces at its end, except one after a backslash."""
    text = line.rstrip(" ")
    num_slashes = len(text) - len(text.rstrip("\\"))
    return f"{text} " if num_slashes % 2 and len(text) < len(line) else text


def _parse_part(glob: str) -> _Part | None:
    """Return the pattern of one name; ``None`` if git matches nothing with it."""
    segments: list[list[str | _Set]] = [[]]
    at = 0
    while at < len(glob):
        character = glob[at]
        at += 1
        if character == "*":
            if segments[-1] or len(segments) == 1:  # two stars are one
                segments.append([])
        elif character == "?":
            segments[-1].append(_Set(None))
        elif character == "[":
            found = _parse_set(glob, at)
            if found is None:
                return None
            one, at = found
            segments[-1].append(one)
        elif character == "\\":
            if at == len(glob):
                return None
            segments[-1].append(glob[at])
            at += 1
        else:
            segments[-1].append(character)
    return _Part.of(*("".join(map(str, s)) if all(isinstance(c, str) for c in s) else tuple(s) for s in segments))


def _parse_set(glob: str, at: int) -> tuple[_Set, int] | None:
    """Return the set that begins after ``[``, and where it ends; ``None`` if it does not end."""
    is_negated = glob[at : at + 1] in {"!", "^"}
    at += is_negated
    ranges: list[tuple[str, str]] = []
    begin = at
    while at < len(glob) and (glob[at] != "]" or at == begin):
        if glob.startswith("[:", at):
            end = glob.find(":]", at + 2)
            if end >= 0 and glob[at + 2 : end].isalpha():
                named = _CLASSES.get(glob[at + 2 : end])
                if named is None:
                    return None
                ranges += [(named[i], named[i + 2]) for i in range(0, len(named), 3)]
                at = end + 2
                continue
        at += glob[at] == "\\"
        if at + 2 < len(glob) and glob[at + 1] == "-" and glob[at + 2] != "]":
            last = at + 2 + (glob[at + 2] == "\\")
            ranges += [(glob[at], glob[at]), (glob[at], glob[last : last + 1])]  # "b-a" is b
            at = last + 1
        else:
            ranges.append((glob[at : at + 1], glob[at : at + 1]))
            at += 1
    return (_Set(tuple(ranges), is_negated), at + 1) if at < len(glob) else None
