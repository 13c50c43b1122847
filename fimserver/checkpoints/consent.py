"""Record which model folders an editor's settings may name: those that the user agreed to, once per workspace.

A server cannot tell the user's own settings from those that came with a repository: an editor merges them. So if an
editor's settings name anything but a shipped model or one added by name (``fimserver model add``), it is loaded only
after the user agreed, whether it exists yet or not. Until then its path is not even accessed, since a name can reach
another machine. Models named in ``config.toml`` or on the command line need no agreement.

    find_known      the model of a name that needs no agreement, or ``None``
    Agreements      agreements and refusals, in a file of the user's

An agreement records the resolved folder: a link that is moved later leads nowhere else.

Knows:  names of models, folders, the state folder.  Never: LSP, weights.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fimserver.checkpoints.installed import find_added, find_recorded, is_hub_name
from fimserver.checkpoints.known import shipped_names
from fimserver.errors import WeightsError
from fimserver.paths import read_plain, write_private

FILE_NAME = "agreements.json"
ANYWHERE = "*"
_MOST = 500
_logger = logging.getLogger(__name__)


def find_known(model: str) -> str | None:
    """Return the model of a name that needs no agreement: a shipped name, or the folder of an added one."""
    if model in shipped_names():
        return model
    try:
        added = find_recorded(model)
    except WeightsError:  # a damaged record is reported when the model is loaded
        return None
    return added.folder if added is not None else None


def to_key(model: str) -> str:
    """Normalize a name for comparison, without accessing any disk."""
    return model if is_hub_name(model.partition("@")[0]) else os.path.normpath(os.path.expanduser(model))  # noqa: PTH111


def is_elsewhere(model: str) -> bool:
    """Return whether a name is a folder on another machine, which an editor's settings must not name."""
    return model.replace("\\", "/").startswith("//")


@dataclass(slots=True)
class _Answer:
    """The folder of a model, and the workspaces that may and may not load it."""

    folder: str
    agreed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Agreements:
    """Agreements and refusals, by workspace."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def find_folder(self, model: str, workspaces: Sequence[str]) -> str | None:
        """Return the folder agreed to for a model in all of these workspaces (URIs), or ``None``."""
        answer = self._read().get(to_key(model))
        return answer.folder if answer is not None and _covers(answer.agreed, workspaces) else None

    def is_refused(self, model: str, workspaces: Sequence[str]) -> bool:
        """Return whether the user refused a model in each of these workspaces."""
        answer = self._read().get(to_key(model))
        return answer is not None and _covers(answer.refused, workspaces)

    def agree(self, model: str, workspaces: Sequence[str]) -> None:
        """Record the user's agreement: in these workspaces, or ``ANYWHERE``. Raises ``OSError``."""
        added = find_added(model) if is_hub_name(model.partition("@")[0]) else None
        folder = str(added or Path(model).expanduser().resolve())
        self._change(model, folder, agreed=workspaces)

    def refuse(self, model: str, workspaces: Sequence[str]) -> None:
        """Record the user's refusal. Raises ``OSError``."""
        self._change(model, "", refused=workspaces or [ANYWHERE])

    def _change(self, model: str, folder: str, *, agreed: Sequence[str] = (), refused: Sequence[str] = ()) -> None:
        answers = self._read()
        answer = answers.pop(to_key(model), _Answer(folder))
        if folder and folder != answer.folder:
            answer = _Answer(folder)  # the earlier agreement was to another folder
        answer.agreed = [*(name for name in answer.agreed if name not in refused), *agreed][-_MOST:]
        answer.refused = [*(name for name in answer.refused if name not in agreed), *refused][-_MOST:]
        answers[to_key(model)] = answer
        while len(answers) > _MOST:
            del answers[next(iter(answers))]
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        values = {key: {"folder": a.folder, "agreed": a.agreed, "refused": a.refused} for key, a in answers.items()}
        write_private(self._path, json.dumps(values, indent=1))

    def _read(self) -> dict[str, _Answer]:
        try:
            values: Any = json.loads(read_plain(self._path))
            return {
                str(key): _Answer(str(given["folder"]), _texts(given["agreed"]), _texts(given["refused"]))
                for key, given in values.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _logger.warning("%s cannot be read (%s); you will be asked again", self._path, type(error).__name__)
            return {}


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def _covers(given: Sequence[str], workspaces: Sequence[str]) -> bool:
    return ANYWHERE in given or (bool(workspaces) and all(workspace in given for workspace in workspaces))
