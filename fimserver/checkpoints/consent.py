"""Record which model folders an editor's settings may name: those that the user agreed to, once per workspace.

A server cannot tell the user's own settings from those that came with a repository: an editor merges them. So if an
editor's settings name anything but a shipped model or one added by name (``fimserver model add``), it is loaded only
after the user agreed, whether it exists yet or not. Until then its path is not even accessed, since a name can reach
another machine. Models named in ``config.toml`` or on the command line need no agreement.

    find_known       the model of a name that needs no agreement, or ``None``
    content_digest   what a folder contains, as a short text
    check_content    compare a folder with what was agreed to
    AnswerBook       the user's answers, in a file
    Agreements       agreements to model folders, and refusals

An agreement records the resolved folder, so a link that is moved later leads nowhere else, and a digest of what it
contains: JSON and text files, the weights' sizes and headers. The process that loads a model compares it.

Knows:  names of models, folders, the state folder.  Never: LSP, weights.
"""

import errno
import hashlib
import json
import logging
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fimserver.checkpoints.installed import find_added, find_recorded, is_hub_name, read_record
from fimserver.checkpoints.known import shipped_names
from fimserver.errors import WeightsError
from fimserver.paths import read_plain, write_private

FILE_NAME = "agreements.json"
ANYWHERE = "*"
CHANGED = "the model folder has changed since you agreed to it"
_MOST = 500
_MOST_BYTES = 64 * 2**20  # of a file that is not weights
_HEADER_BYTES = 2**20  # of weights: their tensors' names and shapes; of a large model they take 0.3 MB
_MOST_FILES = 500
_WEIGHTS = (".safetensors", ".gguf")
_LOADED = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt")
MISSING = "missing"
NOT_AGREED = "not agreed"  # equal to no digest
_changing = threading.Lock()  # a change reads the file and writes it
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


def is_installed(model: str) -> bool:
    """Return whether a name or a folder is that of a model which needs no agreement: shipped, or added by name."""
    if find_known(model) is not None:
        return True
    try:
        return any(added.folder == model for added in read_record().values())
    except WeightsError:
        return False


def to_key(model: str) -> str:
    """Normalize a name for comparison, without accessing any disk."""
    return model if is_hub_name(model.partition("@")[0]) else os.path.normpath(os.path.expanduser(model))  # noqa: PTH111


def is_elsewhere(model: str) -> bool:
    """Return whether a name is a folder on another machine, which an editor's settings must not name."""
    return model.replace("\\", "/").startswith("//")


def may_exist(model: str) -> bool:
    """Return whether a name can be that of a model, without accessing its folder: a full path, or a downloaded name."""
    if os.path.isabs(os.path.expanduser(model)):  # noqa: PTH111, PTH117
        return True
    try:
        return is_hub_name(model.partition("@")[0]) and find_added(model) is not None
    except WeightsError:
        return False


def content_digest(folder: Path) -> str:
    """Return a text that changes when the model of a folder, or of one file, does; ``MISSING`` without either.

    Only files that can be loaded count: weights with their size and beginning, others whole. Raises ``OSError`` if one
    cannot be read, or if there are too many.
    """
    digest = hashlib.sha256()
    is_file = folder.suffix.lower() in _WEIGHTS and folder.is_file()  # one that llama.cpp loads as it is
    if not is_file and not folder.is_dir():
        return MISSING
    paths = [folder] if is_file else sorted(path for path in folder.iterdir() if path.suffix.lower() in _LOADED)
    if len(paths) > _MOST_FILES:
        raise OSError(errno.EFBIG, f"it has more than {_MOST_FILES} files")
    for path in paths:
        digest.update(f"{path.name}\0".encode("utf-8", "surrogatepass"))
        if stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                head = stream.read(_HEADER_BYTES if path.suffix.lower() in _WEIGHTS else _MOST_BYTES)
            digest.update(f"{size}\0".encode() + hashlib.sha256(head).digest())
    return digest.hexdigest()


def check_content(folder: Path, digest: str) -> None:
    """Compare a folder with what was agreed to; an empty digest needs no agreement. Raises ``WeightsError``."""
    if not digest:
        return
    try:
        found = content_digest(folder)
    except OSError as error:
        found = type(error).__name__
    if found != digest:
        msg = f"{CHANGED}: {folder}; you are asked again, or run the command fimserver.restart"
        raise WeightsError(msg)


@dataclass(slots=True)
class _Answer:
    """What was asked about, its contents, and the workspaces in which the user agreed and refused."""

    folder: str
    digest: str = ""
    agreed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class AnswerBook:
    """A file with the user's answers, by a key and by workspace (URIs)."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def change(
        self,
        key: str,
        target: str,
        digest: str,
        *,
        agreed: Sequence[str] = (),
        refused: Sequence[str] = (),
    ) -> None:
        """Record an answer about ``target`` with these contents; "" leaves both as they are. Raises ``OSError``."""
        with _changing:
            answers = self.read()
            answer = answers.pop(key, _Answer(target, digest))
            if target and (target, digest) != (answer.folder, answer.digest):
                # the earlier agreement was to another target, or to other contents
                answer = _Answer(target, digest, refused=answer.refused)
            answer.agreed = [*(name for name in answer.agreed if name not in refused), *agreed][-_MOST:]
            answer.refused = [*(name for name in answer.refused if name not in agreed), *refused][-_MOST:]
            answers[key] = answer
            while len(answers) > _MOST:
                del answers[next(iter(answers))]
            self._write(answers)

    def revoke(self, target: str) -> bool:
        """Forget the agreements to a target; return whether there were any. Raises ``OSError``."""
        with _changing:
            answers = self.read()
            found = [answer for answer in answers.values() if answer.folder == target and answer.agreed]
            for answer in found:
                answer.agreed = []
            if found:
                self._write(answers)
            return bool(found)

    def read(self) -> dict[str, _Answer]:
        """Return all answers; none if the file is missing or damaged."""
        try:
            values: Any = json.loads(read_plain(self._path))
            return {
                str(key): _Answer(
                    str(given["folder"]),
                    str(given.get("digest", "")),
                    _texts(given["agreed"]),
                    _texts(given["refused"]),
                )
                for key, given in values.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _logger.warning("%s cannot be read (%s); you will be asked again", self._path, type(error).__name__)
            return {}

    def _write(self, answers: dict[str, _Answer]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._path, json.dumps({key: asdict(answer) for key, answer in answers.items()}, indent=1))


class Agreements:
    """Agreements and refusals about model folders, by workspace."""

    def __init__(self, path: Path) -> None:
        self._answers = AnswerBook(path)

    def find_folder(self, model: str, workspaces: Sequence[str]) -> str | None:
        """Return the folder agreed to for a model in all of these workspaces (URIs), or ``None``."""
        answer = self._answers.read().get(to_key(model))
        has_content = answer is not None and bool(answer.digest)
        return answer.folder if answer is not None and has_content and covers(answer.agreed, workspaces) else None

    def find_digest(self, folder: str, workspaces: Sequence[str]) -> str | None:
        """Return the contents that were agreed to of a folder in all of these workspaces, or ``None``."""
        answers = reversed(self._answers.read().values())  # the last agreement counts, under whatever name
        found = (a.digest for a in answers if a.folder == folder and a.digest and covers(a.agreed, workspaces))
        return next(found, None)

    def is_refused(self, model: str, workspaces: Sequence[str]) -> bool:
        """Return whether the user refused a model in each of these workspaces."""
        answer = self._answers.read().get(to_key(model))
        return answer is not None and covers(answer.refused, workspaces)

    def agree(self, model: str, workspaces: Sequence[str]) -> None:
        """Record the user's agreement: in these workspaces, or ``ANYWHERE``. Reads the folder. Raises ``OSError``."""
        added = find_added(model) if is_hub_name(model.partition("@")[0]) else None
        folder = added or Path(model).expanduser().resolve()
        self._answers.change(to_key(model), str(folder), content_digest(folder), agreed=workspaces)

    def revoke(self, folder: str) -> None:
        """Forget the agreements to a folder: its contents have changed. Raises ``OSError``."""
        self._answers.revoke(folder)

    def refuse(self, model: str, workspaces: Sequence[str]) -> None:
        """Record the user's refusal. Raises ``OSError``."""
        self._answers.change(to_key(model), "", "", refused=workspaces or [ANYWHERE])


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


def covers(given: Sequence[str], workspaces: Sequence[str]) -> bool:
    """Return whether an answer was given for all of these workspaces (URIs), of which there is at least one."""
    return ANYWHERE in given or (bool(workspaces) and all(workspace in given for workspace in workspaces))
