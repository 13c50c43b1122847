"""Find the models on this machine: shipped, added by name, or already in the Hugging Face cache.

    find_model      the folder of a shipped name, a path, or an added name
    find_gguf       the GGUF file of a path, a folder or an added name
    find_added      the folder of an added name or of one in the Hugging Face cache; never uses the network
    list_models     shipped, added and known models
    find_removal    what a removal would free

A model on the hub has a name with a slash, ``owner/name``. That of a GGUF file on the disk has a name without one, and
its folder is fimserver's own, with a link to the user's file.

Knows:   the record of added models, the Hugging Face cache.  Never: the network, tensors.
Raises:  ``WeightsError`` with the remedy.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fimserver.checkpoints.gguf import GGUF_SUFFIX
from fimserver.checkpoints.known import SHIPPED_MODELS, read_known, shipped_names
from fimserver.errors import WeightsError
from fimserver.paths import data_folder, read_plain

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_LOCAL_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*", re.ASCII)
_LONGEST_NAME = 200  # characters
MAIN_BRANCH = "main"
LOCAL = "local"  # the revision of a GGUF file on the disk
WEIGHTS_SUFFIX = ".safetensors"
NEEDED_FILES = ("config.json", "tokenizer.json")
INDEX_FILE = "model.safetensors.index.json"


def find_model(name: str) -> Path:
    """Return the folder of a shipped model's name, a path, or an added name. Raises ``WeightsError``."""
    shipped = shipped_names()
    if name in shipped:
        return SHIPPED_MODELS / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if added := find_added(name):
        return added
    if folder.suffix.lower() == ".gguf" and folder.is_file():
        msg = f"{name} is a file, not a model's name; add it first with: fimserver model add {name}"
        raise WeightsError(msg)
    if is_hub_name(name.partition("@")[0]):
        msg = (
            f"model {name!r} is neither a folder nor downloaded nor one of: {', '.join(shipped)}; "
            f"download it with: fimserver model add {name}, or set fimserver.model to another"
        )
        raise WeightsError(msg)
    msg = f"model {name!r} is neither a folder nor one of: {', '.join(shipped)}; set fimserver.model to one"
    raise WeightsError(msg)


def find_gguf(name: str) -> Path:
    """Return the GGUF file of a path, a folder or an added name. Raises ``WeightsError``."""
    path = Path(name).expanduser()
    if path.suffix.lower() == GGUF_SUFFIX and path.is_file():
        return path
    folder = find_model(name)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == GGUF_SUFFIX)
    if len(found) != 1:
        has = "no GGUF file" if not found else f"{len(found)} GGUF files"
        msg = f"model {name!r} has {has}; for the engine llamacpp set fimserver.model to the path of one"
        raise WeightsError(msg)
    return found[0]


@dataclass(frozen=True, slots=True)
class AddedModel:
    """One entry of the record."""

    name: str
    revision: str
    commit: str
    folder: str


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One entry of the list; ``state`` is shipped, added or known (not downloaded).

    ``licence`` and ``use`` are those of known models, downloaded or not.
    """

    name: str
    state: str
    num_bytes: int | None
    folder: str | None
    commit: str | None = None
    licence: str | None = None
    use: str | None = None


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal would free; ``execute`` does it. Other programs may use the files of a shared folder."""

    name: str
    num_bytes: int
    folder: Path
    execute: Callable[[], None]
    is_shared: bool = True


def is_hub_name(text: str) -> bool:
    """Return whether a text could be ``owner/name``."""
    return bool(_NAME.fullmatch(text)) and len(text) <= _LONGEST_NAME and "--" not in text and ".." not in text


def is_local_name(text: str) -> bool:
    """Return whether a text can be the name of a GGUF file's model, which is also the name of its folder."""
    return (
        bool(_LOCAL_NAME.fullmatch(text)) and len(text) <= _LONGEST_NAME and ".." not in text and not text.endswith(".")
    )


def is_revision(text: str) -> bool:
    """Return whether a text can be a branch, a tag or a commit, and stays inside of a folder as a path."""
    return bool(_REVISION.fullmatch(text)) and ".." not in text and len(text) <= _LONGEST_NAME


def gguf_folder() -> Path:
    """Return the folder that holds a folder for each added GGUF file."""
    return data_folder() / "gguf"


def find_recorded(text: str) -> AddedModel | None:
    """Return the record of ``owner/name[@revision]``, or ``None``. Raises ``WeightsError``."""
    name, _, revision = text.partition("@")
    added = read_record().get(name)
    return added if added is not None and revision in {"", added.revision, added.commit} else None


def find_added(text: str, *, needs_weights: bool = True) -> Path | None:
    """Return the folder of ``owner/name[@revision]`` by the record, else by the Hugging Face cache, or ``None``.

    The name of a GGUF file's model is only in the record. Without ``needs_weights``, config and tokenizer are enough.

    huggingface_hub is imported only for a name that is not in the record.
    """
    name, _, revision = text.partition("@")
    if not (is_hub_name(name) or is_local_name(name)) or (revision and not is_revision(revision)):
        return None
    added = find_recorded(text)
    if added is not None and (Path(added.folder) / "config.json").is_file():
        return Path(added.folder)
    weights = [f"*{WEIGHTS_SUFFIX}", INDEX_FILE] if needs_weights else []
    return _find_cached(name, revision or MAIN_BRANCH, [*weights, *NEEDED_FILES]) if is_hub_name(name) else None


def _find_cached(name: str, revision: str, files: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow to import
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=files,
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
    except (OSError, HFValidationError):  # absent or incomplete
        return None
    folder = Path(found)
    return folder if all((folder / needed).is_file() for needed in NEEDED_FILES) else None


def prepare_hub() -> None:
    """Configure huggingface_hub before its first import: no telemetry, and plain HTTP, which can resume."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_XET"] = "1"


def list_models() -> list[ListedModel]:
    """List shipped models, then added ones, then known ones that were not added."""
    shipped = [
        ListedModel(name, "shipped", _folder_bytes(SHIPPED_MODELS / name), str(SHIPPED_MODELS / name))
        for name in shipped_names()
    ]
    record = read_record()
    published = {fact["name"]: fact for _, facts in read_known() for fact in facts if is_hub_name(fact["name"])}
    added = [
        ListedModel(
            a.name, "added", _folder_bytes(Path(a.folder)), a.folder, a.commit, *_licence_and_use(published, a.name)
        )
        for a in sorted(record.values(), key=lambda a: a.name)
    ]
    known = [
        ListedModel(name, "known", fact["file_bytes"], None, None, *_licence_and_use(published, name))
        for name, fact in published.items()
        if name not in record
    ]
    return [*shipped, *added, *known]


def _licence_and_use(published: Mapping[str, Mapping[str, str]], name: str) -> tuple[str | None, str | None]:
    fact = published.get(name, {})
    return fact.get("licence"), fact.get("use")


def _folder_bytes(folder: Path) -> int | None:
    """Return the size of the files in a folder; ``None`` if it is gone, or a file that it links to."""
    if folder.is_dir() and any(f.is_symlink() and not f.exists() for f in folder.iterdir()):
        return None
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else None


def find_removal(name: str) -> Removal:
    """Return what to remove under a name: the added revision, or all that the cache has of it.

    Raises ``WeightsError`` if neither the record nor the cache has it.
    """
    added = read_record().get(name)
    if added is not None and added.revision == LOCAL:
        return _find_local_removal(added)
    prepare_hub()
    from huggingface_hub import constants, scan_cache_dir  # noqa: PLC0415
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415

    # .../models--owner--name/snapshots/commit
    cache = Path(added.folder).parents[2] if added else Path(constants.HF_HUB_CACHE).expanduser().absolute()
    try:
        found = scan_cache_dir(cache)
    except CacheNotFound:
        found = None
    cached = (
        [r for repo in found.repos if (repo.repo_type, repo.repo_id) == ("model", name) for r in repo.revisions]
        if found
        else []
    )
    commits = [r.commit_hash for r in cached if added is None or r.commit_hash == added.commit]
    if added is None and not commits:
        msg = f"{name} was not added; `fimserver model list` shows the added models"
        raise WeightsError(msg)
    strategy = found.delete_revisions(*commits) if found and commits else None

    def execute() -> None:
        change_record(lambda record: {key: value for key, value in record.items() if key != name})
        if strategy:
            strategy.execute()

    folder = cache / f"models--{name.replace('/', '--')}"
    return Removal(name, strategy.expected_freed_size if strategy else 0, folder, execute)


def _find_local_removal(added: AddedModel) -> Removal:
    """Return what to remove of a GGUF file's model: its folder with a link, never the file."""
    folder = Path(added.folder)

    def execute() -> None:
        change_record(lambda record: {key: value for key, value in record.items() if key != added.name})
        if folder.parent == gguf_folder():
            shutil.rmtree(folder, ignore_errors=True)  # links in it are removed, not followed

    own = (f for f in folder.iterdir() if not f.is_symlink() and f.stat().st_nlink == 1) if folder.is_dir() else ()
    return Removal(added.name, sum(f.stat().st_size for f in own), folder, execute, is_shared=False)


def record_file() -> Path:
    """Return the path of the record of added models."""
    return data_folder() / "models.json"


def read_record() -> dict[str, AddedModel]:
    """Return the added models by name. Raises ``WeightsError`` if the file is not a record."""
    path = record_file()
    if not path.exists():
        return {}
    try:
        values = json.loads(read_plain(path))
        return {name: AddedModel(name=name, **value) for name, value in values["models"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"{path} cannot be read ({type(error).__name__}); delete it and add the models again (no second download)"
        raise WeightsError(msg) from error


def change_record(change: Callable[[dict[str, AddedModel]], Mapping[str, AddedModel]]) -> None:
    """Replace the record by ``change`` of it, under a file lock."""
    from filelock import FileLock  # noqa: PLC0415

    path = record_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        models = {}
        for name, added in sorted(change(read_record()).items()):
            models[name] = {key: value for key, value in asdict(added).items() if key != "name"}
        write_whole(path, json.dumps({"models": models}, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def to_gigabytes(num_bytes: int | None) -> str:
    """Format a size for display; GB are 1e9 bytes."""
    if num_bytes is None:
        return "unknown size"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 100_000_000 else f"{num_bytes / 1e6:.1f} MB"  # noqa: PLR2004
