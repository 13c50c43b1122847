"""Which model folders an editor's settings may name: those that the person agreed to, once for each workspace.

A server cannot tell a person's own settings from those that came with a repository: an editor merges them. So a folder
that an editor's settings name is loaded only after the person said so. What needs no agreement: a shipped model, one
that was added by name (``fimserver model add``), and what ``config.toml`` or the command line says.

    needs_agreement   whether a value of fimserver.model is a folder that somebody has to agree to
    Agreements        what was agreed, in a file of the person's

Knows:  names of models, folders, the state folder.  Never: LSP, weights.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fimserver.engine.known import SHIPPED_MODELS
from fimserver.paths import read_plain, write_private

FILE_NAME = "agreements.json"
ANYWHERE = "*"
_MOST = 500
_logger = logging.getLogger(__name__)


def needs_agreement(model: str) -> bool:
    """Whether a model's name is a folder that is there, and nothing the person has set up before."""
    try:
        is_shipped = Path(model).name == model and (SHIPPED_MODELS / model / "fimserver.json").is_file()
        return bool(model) and not is_shipped and Path(model).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        return False  # no folder, as the engine will say


def resolve(model: str) -> str:
    """The folder that is meant; links are followed, so that another one in its place is not agreed to."""
    return str(Path(model).expanduser().resolve())


class Agreements:
    """What was agreed, by workspace."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def allows(self, model: str, workspaces: Sequence[str]) -> bool:
        """Whether a model's folder may be loaded in each of these workspaces (URIs)."""
        agreed = self._read().get(resolve(model), [])
        return ANYWHERE in agreed or (bool(workspaces) and all(workspace in agreed for workspace in workspaces))

    def add(self, model: str, workspaces: Sequence[str]) -> None:
        """The person agreed: in these workspaces, or ``ANYWHERE``. Raises ``OSError``."""
        agreed = self._read()
        folder = resolve(model)
        known = agreed.pop(folder, [])
        agreed[folder] = [*known, *(workspace for workspace in workspaces if workspace not in known)][-_MOST:]
        while len(agreed) > _MOST:
            del agreed[next(iter(agreed))]
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._path, json.dumps(agreed, indent=1))

    def _read(self) -> dict[str, list[str]]:
        try:
            values: Any = json.loads(read_plain(self._path))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            _logger.warning("%s cannot be read (%s); you will be asked again", self._path, type(error).__name__)
            return {}
        if not isinstance(values, dict):
            return {}
        return {
            folder: [name for name in names if isinstance(name, str)]
            for folder, names in values.items()
            if isinstance(names, list)
        }
