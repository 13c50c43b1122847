"""Identify this build, so that an editor is never served by the code of another checkout or an older install.

Knows:  the package's own files.  Never: what they do. Standard library only.
"""

import os
from pathlib import Path

from fimserver import __version__

Build = tuple[int, ...]
_PACKAGE = str(Path(__file__).parents[1])


def read_build() -> Build:
    """Return the version's numbers, then the time (ns) of the newest Python file; a greater build is newer."""
    version = tuple(int(part) if part.isdigit() else 0 for part in __version__.split(".")[:3])
    return (*version, _newest(_PACKAGE))


def _newest(folder: str) -> int:
    newest = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                newest = max(newest, _newest(entry.path) if entry.name != "__pycache__" else 0)
            elif entry.name.endswith(".py"):
                newest = max(newest, entry.stat().st_mtime_ns)
    return newest
