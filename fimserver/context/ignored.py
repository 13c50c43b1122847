"""Which files are nobody's business: their text is neither completed, nor read for others, nor kept.

    .fimserverignore   in any folder above a file, in .gitignore's words; always
    .gitignore         within a repository, with .git/info/exclude and the person's own; unless settings say otherwise
    names              of keys and credentials (``hole.py: is_private``), also behind a link

Within a folder that is ignored nothing can be un-ignored, as git has it. Of two files that speak of the same name the
deeper one wins.

Knows:  names of files, ignore files.  Never: the texts of other files.
Source: gitignore(5); patterns by pathspec.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pathspec import GitIgnoreSpec

from fimserver.context.hole import PRIVATE_FILE, is_private
from fimserver.datatypes import NoCompletion

OWN_FILE, GIT_FILE = ".fimserverignore", ".gitignore"
_LARGEST_BYTES = 1_000_000
_MOST_STARS = 3  # in one part of a path
_FOLDER_MARK = "ps_d"  # pathspec's name for the slash that a match of a folder ends with
_ANY_FOLDER = f"(?P<{_FOLDER_MARK}>/)"  # and what it makes of "*/", which matches the first slash
_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Rules:
    """One ignore file: where its patterns begin, and what it says."""

    folder: Path
    spec: GitIgnoreSpec


@dataclass(slots=True)
class IgnoreRules:
    """Ignore files as they were read last; each is read again when it has changed."""

    _read: dict[Path, tuple[_Identity, GitIgnoreSpec]] = field(default_factory=dict)

    def refuse(self, uri: str, *, with_git: bool = True) -> NoCompletion | None:
        """Why a document is nobody's business; ``None`` for one that may be read, and for what is no file."""
        if is_private(uri):
            return PRIVATE_FILE
        for each in _paths_of(uri):
            if is_private(each.as_uri()):
                return PRIVATE_FILE
            if (by := self._ignored_by(each, OWN_FILE)) is not None:
                return NoCompletion("ignored_file", f"{by} names this file; it is never read")
            if with_git and (by := self._ignored_by(each, GIT_FILE)) is not None:
                hint = "set fimserver.completeIgnored to complete there all the same"
                return NoCompletion("ignored_file", f"{by} names this file; {hint}")
        return None

    def _ignored_by(self, path: Path, name: str) -> Path | None:
        """The ignore file by which a path, or a folder above it, is ignored."""
        above = list(self._rules_above(path, name))
        if not above:
            return None
        for part in (*reversed(path.parents), path):
            decided: tuple[bool, Path] | None = None
            for source, rules in above:
                if part == rules.folder or not part.is_relative_to(rules.folder):
                    continue
                inside = part.relative_to(rules.folder).as_posix()
                said = _says(rules.spec, inside if part is path else f"{inside}/")
                if said is not None:
                    decided = said, source
            if decided is not None and decided[0]:
                return decided[1]
        return None

    def _rules_above(self, path: Path, name: str) -> Iterator[tuple[Path, _Rules]]:
        """Ignore files that may speak of a path, the outermost first."""
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
        """The patterns of a file; what cannot be read says nothing."""
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):  # a device or a pipe would be read without end
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
    """The file of a URI, as it is named and as it is behind links; none for what is no file of this machine."""
    path = path_of_file(uri)
    try:
        return list(dict.fromkeys((path, Path(os.path.realpath(path))))) if path is not None else []
    except (OSError, ValueError):
        return []


def path_of_file(uri: str) -> Path | None:
    """The file of a ``file:`` or ``vscode-notebook-cell:`` URI on this machine; ``None`` for others and odd ones."""
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
    """Whether patterns ignore a name (a folder's ends with a slash) or take it back; ``None`` where they do neither.

    The last that matches wins. What matches a folder above the name only is left aside: that folder was asked already.
    """
    said = None
    for pattern in spec.patterns:
        if pattern.include is None or (found := pattern.match_file(name)) is None:
            continue
        below = found.match.groupdict().get(_FOLDER_MARK)
        expression = pattern.regex.pattern if pattern.regex is not None else ""
        is_any_folder = expression == _ANY_FOLDER and name.endswith("/")
        if below is None or is_any_folder or found.match.end(_FOLDER_MARK) == len(name):
            said = pattern.include
    return said


def _is_pattern(line: str) -> bool:
    """Whether a line can be read as a pattern, in little time: one that cannot is left, the others count."""
    if any(part.count("*") > _MOST_STARS for part in line.split("/")):
        return False  # each more multiplies the time by a name's length
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
