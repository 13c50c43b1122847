"""Decide which files are ignored: not completed, not read for others, not stored.

    .fimserverignore   in any folder above a file, in the syntax of .gitignore; always
    .gitignore         in a repository, with .git/info/exclude and the user's global one; unless settings say otherwise
    names              of keys and credentials (``names.py: is_private``), also those of symbolic links' targets

As in git, nothing can be re-included below an ignored folder. If two ignore files match a name, the deeper one wins.

Knows:  names of files, their permissions, ignore files.  Never: the texts of other files.
Source: gitignore(5); patterns by pathspec.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pathspec import GitIgnoreSpec

from fimserver.context.privacy.names import PRIVATE_FILE, is_private
from fimserver.datatypes import NoCompletion

OWN_FILE, GIT_FILE = ".fimserverignore", ".gitignore"
_LARGEST_BYTES = 1_000_000
_MOST_STARS = 3  # per path component
# pathspec's private group for the slash that ends the match of a folder; it has no public way to ask. The version is
# pinned, and tests/lsp/test_privacy.py compares the results with git's.
_FOLDER_MARK = "ps_d"
_ANY_FOLDER = f"(?P<{_FOLDER_MARK}>/)"  # pathspec's regex for "*/", which matches the first slash
_Identity = tuple[int, int]


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
    """One ignore file: its folder and its patterns."""

    folder: Path
    spec: GitIgnoreSpec


@dataclass(slots=True)
class IgnoreRules:
    """Cached ignore files; each is read again when it has changed."""

    _read: dict[Path, tuple[_Identity, GitIgnoreSpec]] = field(default_factory=dict)

    def refuse(self, uri: str, *, with_git: bool = True) -> NoCompletion | None:
        """Return why a document is ignored; ``None`` for one that may be read and for a URI that is not a file."""
        if is_private(uri):
            return PRIVATE_FILE
        for each in _paths_of(uri):
            if is_private(each.as_uri()):
                return PRIVATE_FILE
            if (by := self._ignored_by(each, OWN_FILE)) is not None:
                return NoCompletion("ignored_file", f"{by} matches this file; it is never read")
            if with_git and (by := self._ignored_by(each, GIT_FILE)) is not None:
                hint = "set fimserver.completeIgnored to true to complete there"
                return NoCompletion("ignored_file", f"{by} matches this file; {hint}")
        return None

    def _ignored_by(self, path: Path, name: str) -> Path | None:
        """Return the ignore file that ignores a path or a folder above it."""
        above = list(self._rules_above(path, name))
        if not above:
            return None
        for part in (*reversed(path.parents), path):
            decided: tuple[bool, Path] | None = None
            for source, rules in above:
                if part == rules.folder or not part.is_relative_to(rules.folder):
                    continue
                inside = part.relative_to(rules.folder).as_posix()
                given = _says(rules.spec, inside if part is path else f"{inside}/")
                if given is not None:
                    decided = given, source
            if decided is not None and decided[0]:
                return decided[1]
        return None

    def _rules_above(self, path: Path, name: str) -> Iterator[tuple[Path, _Rules]]:
        """Yield the ignore files that may match a path, the outermost first."""
        folders = list(reversed(path.parents))
        if name == GIT_FILE:
            root = next((f for f in reversed(folders) if (f / ".git").exists()), None)
            if root is None:
                return
            folders = [f for f in folders if f.is_relative_to(root)]
            home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            for file in (home / "git" / "ignore", root / ".git" / "info" / "exclude"):
                if (spec := self._spec_of(file)) is not None:
                    yield file, _Rules(root, spec)
        for folder in folders:
            if (spec := self._spec_of(folder / name)) is not None:
                yield folder / name, _Rules(folder, spec)

    def _spec_of(self, file: Path) -> GitIgnoreSpec | None:
        """Return the patterns of a file; an unreadable file has none."""
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):  # reading a device or a pipe may never end
                raise ValueError  # noqa: TRY301  as one that cannot be read
            identity = found.st_mtime_ns, found.st_size
            known = self._read.get(file)
            if known is None or known[0] != identity:
                with file.open("rb") as stream:
                    data = stream.read(_LARGEST_BYTES)
                lines = data.decode("utf-8-sig", "replace").splitlines()
                self._read[file] = known = identity, GitIgnoreSpec.from_lines(filter(_is_pattern, lines))
        except (OSError, ValueError):
            self._read.pop(file, None)
            return None
        return known[1]


def _paths_of(uri: str) -> list[Path]:
    """Return a URI's path as named and with symbolic links resolved; empty if it is not a file on this machine."""
    path = path_of_file(uri)
    try:
        return list(dict.fromkeys((path, Path(os.path.realpath(path))))) if path is not None else []
    except (OSError, ValueError):
        return []


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


def _says(spec: GitIgnoreSpec, name: str) -> bool | None:
    """Return whether patterns ignore a name (a folder's ends with a slash) or re-include it; ``None`` if neither.

    The last match wins. Matches of a folder above the name are skipped: that folder was checked before.
    """
    given = None
    for pattern in spec.patterns:
        if pattern.include is None or (found := pattern.match_file(name)) is None:
            continue
        below = found.match.groupdict().get(_FOLDER_MARK)
        expression = pattern.regex.pattern if pattern.regex is not None else ""
        is_any_folder = expression == _ANY_FOLDER and name.endswith("/")
        if below is None or is_any_folder or found.match.end(_FOLDER_MARK) == len(name):
            given = pattern.include
    return given


def _is_pattern(line: str) -> bool:
    """Return whether a line is a valid and quickly matched pattern; others are skipped."""
    if any(part.count("*") > _MOST_STARS for part in line.split("/")):
        return False  # each further star multiplies the time by the length of a name
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
