"""Decide which files are ignored: not completed, not read for others, not stored.

    .fimserverignore   in any folder above a file, in the syntax of .gitignore; always
    .gitignore         in a repository, with .git/info/exclude and the user's global one; unless settings say otherwise
    names              of keys and credentials (``names.py: is_private``), also those of symbolic links' targets

As in git, nothing can be re-included below an ignored folder. If two ignore files match a name, the deeper one wins.
Where an ignore file cannot be applied, because it is too large, nothing is read.

Knows:  names of files, their permissions, ignore files.  Never: the texts of other files.
Source: gitignore(5).
"""

import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fimserver.context.privacy.names import PRIVATE_FILE, is_private
from fimserver.context.privacy.patterns import IgnorePatterns, TooCostlyError, Work
from fimserver.datatypes import NoCompletion

OWN_FILE, GIT_FILE = ".fimserverignore", ".gitignore"
_LARGEST_BYTES = 200_000
_MOST_FILES = 500  # that are kept
_LONGEST_PATH, _MOST_PARTS = 4096, 256  # no system that we know opens a file with a longer path
_LONGEST_URI = 4 * _LONGEST_PATH
_Identity = tuple[int, int]
_LONG_PATH = NoCompletion("long_path", f"its path has more than {_LONGEST_PATH} characters or {_MOST_PARTS} folders")
_OVERRIDE = "set fimserver.completeIgnored to true to complete there"


def is_writable(uri: str) -> bool:
    """Return whether a document can be saved, as far as is known: only an existing read-only file cannot."""
    parts = urlsplit(uri) if uri.startswith("file:///") else None
    path = unquote(parts.path) if parts else ""
    try:
        return not path or not os.path.exists(path) or os.access(path, os.W_OK)  # noqa: PTH110  accepts any path
    except (OSError, ValueError):
        return True


@dataclass(frozen=True, slots=True)
class _Rules:
    """One ignore file: how many folders are above what it is about, and its patterns; ``None`` if it is too large."""

    file: str
    depth: int
    patterns: IgnorePatterns | None


@dataclass(slots=True)
class IgnoreRules:
    """Cached ignore files; each is read again when it has changed."""

    _read: OrderedDict[str, tuple[_Identity, IgnorePatterns | None]] = field(default_factory=OrderedDict)

    def refuse(self, uri: str, *, with_git: bool = True) -> NoCompletion | None:
        """Return why a document is ignored; ``None`` for one that may be read and for a URI that is not a file."""
        path = path_of_file(uri) if len(uri) <= _LONGEST_URI else None
        parts = path.parts if path is not None else ()
        if len(uri) > _LONGEST_URI or len(parts) > _MOST_PARTS or sum(map(len, parts)) > _LONGEST_PATH:
            return _LONG_PATH
        if is_private(uri):
            return PRIVATE_FILE
        work = Work()
        for each in _with_target(path) if path is not None else ():
            if is_private(each.as_uri()):
                return PRIVATE_FILE
            for name in (OWN_FILE, GIT_FILE) if with_git else (OWN_FILE,):
                if (refusal := self._refuse_by(each, name, work)) is not None:
                    return refusal
        return None

    def _refuse_by(self, path: Path, name: str, work: Work) -> NoCompletion | None:
        """Return why ignore files of one name refuse a path, or ``None``."""
        hint = f"; {_OVERRIDE}" if name == GIT_FILE else "; it is never read"
        above = self._rules_above(path, name)
        if large := [rules.file for rules in above if rules.patterns is None]:
            return NoCompletion("ignored_file", f"{large[0]} is too large to be applied{hint}")
        try:
            by = _ignored_by(path.parts, above, work)
        except TooCostlyError:
            files = ", ".join(rules.file for rules in above)
            return NoCompletion("ignored_file", f"the patterns take too long to apply ({files}){hint}")
        return NoCompletion("ignored_file", f"{by} matches this file{hint}") if by is not None else None

    def _rules_above(self, path: Path, name: str) -> list[_Rules]:
        """Return the ignore files that may match a path, the outermost first."""
        folders = list(reversed(path.parents))
        found: list[tuple[Path, int]] = []
        if name == GIT_FILE:
            roots = [depth for depth, folder in enumerate(folders, 1) if _exists(folder / ".git")]
            if not roots:
                return []
            root, folders_from = folders[roots[-1] - 1], roots[-1]
            home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111  without a home it stays
            found = [(Path(home, "git", "ignore"), folders_from), (root / ".git" / "info" / "exclude", folders_from)]
        else:
            folders_from = 1
        found += [(folder / name, depth) for depth, folder in enumerate(folders, 1) if depth >= folders_from]
        return [rules for file, depth in found if (rules := self._rules_of(str(file), depth)) is not None]

    def _rules_of(self, file: str, depth: int) -> _Rules | None:
        """Return the patterns of a file; ``None`` for an unreadable file."""
        try:
            status = os.stat(file)  # noqa: PTH116  most do not exist: this is called for every folder
            if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may never end
                return None
            identity = status.st_mtime_ns, status.st_size
            known = self._read.get(file)
            if known is None or known[0] != identity:
                known = identity, _read_patterns(file, status.st_size)
                self._read[file] = known
                while len(self._read) > _MOST_FILES:
                    self._read.popitem(last=False)
        except (OSError, ValueError):
            self._read.pop(file, None)
            return None
        return _Rules(file, depth, known[1])


def _read_patterns(file: str, num_bytes: int) -> IgnorePatterns | None:
    """Return a file's patterns; ``None`` if it is too large. Raises ``OSError``."""
    if num_bytes > _LARGEST_BYTES:
        return None
    with Path(file).open("rb") as stream:
        data = stream.read(_LARGEST_BYTES)
    try:
        return IgnorePatterns.parse(data.decode("utf-8-sig", "replace"))
    except TooCostlyError:
        return None


def _ignored_by(parts: Sequence[str], above: Sequence[_Rules], work: Work) -> str | None:
    """Return the ignore file that ignores a path or a folder above it. Raises ``TooCostlyError``."""
    for end in range(2, len(parts) + 1):  # the first part is the root
        decided: tuple[bool, str] | None = None
        for rules in above:
            if rules.depth < end and rules.patterns is not None:
                inside, is_folder = parts[rules.depth : end], end < len(parts)
                given = rules.patterns.decide(inside, is_folder=is_folder, work=work)
                if given is not None:
                    decided = given, rules.file
        if decided is not None and decided[0]:
            return decided[1]
    return None


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises for a folder that may not be searched


def _with_target(path: Path) -> list[Path]:
    """Return a path as named and with symbolic links resolved."""
    try:
        return list(dict.fromkeys((path, Path(os.path.realpath(path)))))
    except (OSError, ValueError):
        return [path]


def path_of_file(uri: str) -> Path | None:
    """Return the path of a ``file:`` or ``vscode-notebook-cell:`` URI; ``None`` for other and malformed ones."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    if parts.scheme not in {"file", "vscode-notebook-cell"} or parts.netloc not in {"", "localhost"}:
        return None
    text = unquote(parts.path)
    if os.name == "nt":
        text = text.lstrip("/")
    path = Path(text)
    return path if path.is_absolute() and "\0" not in text else None
