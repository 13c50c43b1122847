"""Models that a person added by name: what the hub offers, fetching it, the record of it, and removing it.

    find_offer     what would be fetched, its licence and size: two questions to the hub, nothing kept
    add_model      small files, the check of the config, weights, the check of their headers, the record
    find_added     folder of a name that was added, or that is in the Hugging Face cache; never a network
    list_models    shipped, known and added
    remove_model   the record, and the files of that revision

Files lie in the Hugging Face cache, as huggingface_hub lays it out, so that other programs share them. huggingface_hub
throws away what it has of a file when its process ends; here weights go to a partial file beside the blobs, which the
next run goes on with, and are held against the hub's SHA-256 before they get their name.

Knows:   the hub, its cache, the record.  Never: documents, tensors; a network outside of find_offer and add_model.
Raises:  ``WeightsError`` that says what to do.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fimserver.engine.folder import read_json
from fimserver.engine.known import SHIPPED_MODELS, read_known, shipped_names
from fimserver.errors import WeightsError
from fimserver.paths import data_folder

Report = Callable[[str, int, int], None]  # what is fetched, bytes done, all bytes
_NAME = re.compile(r"^[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*$", re.ASCII)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_MAIN = "main"
_WEIGHTS_END = ".safetensors"
_NEEDED = ("config.json", "tokenizer.json")
_INDEX = "model.safetensors.index.json"
_SMALL = (
    *_NEEDED,
    _INDEX,
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "fimserver.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "README.md",
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_READ_BYTES = 2**22
_SPARE_BYTES = 2**28  # of a disk, that a download leaves


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository; ``blob`` is its name in the cache: SHA-256 of a large file, git's id of a small one."""

    name: str
    num_bytes: int
    blob: str
    is_large: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """What the hub has under a name, and what of it would be fetched to where."""

    name: str
    revision: str
    commit: str
    licence: str
    changed: str
    is_gated: bool
    page: str
    files: tuple[HubFile, ...]
    folder: Path  # of the repository in the cache
    free_bytes: int

    @property
    def num_bytes(self) -> int:
        """All of it, on disk."""
        return sum(file.num_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What is not on disk yet; a file that was begun counts with its rest."""
        return sum(file.num_bytes - self._present_bytes(file) for file in self.files)

    def _present_bytes(self, file: HubFile) -> int:
        if (self.folder / "blobs" / file.blob).exists():
            return file.num_bytes
        part = _partial_file(self.folder, file)
        return min(part.stat().st_size, file.num_bytes) if part.exists() else 0


@dataclass(frozen=True, slots=True)
class AddedModel:
    """One entry of the record."""

    name: str
    revision: str
    commit: str
    folder: str


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of the list; ``state`` is shipped, added or known, which is to say not downloaded."""

    name: str
    state: str
    num_bytes: int | None
    folder: str | None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal would free; ``execute`` does it."""

    name: str
    num_bytes: int
    folder: Path
    execute: Callable[[], None]


def parse_name(text: str) -> tuple[str, str]:
    """Name and revision of ``owner/name`` or ``owner/name@revision``. Raises ``WeightsError``."""
    name, at, revision = text.partition("@")
    if not is_hub_name(name) or (at and not revision):
        msg = f"{text!r} is no name of the hub; write owner/name, or owner/name@revision"
        raise WeightsError(msg)
    return name, revision or _MAIN


def is_hub_name(text: str) -> bool:
    """Whether a text could be ``owner/name``."""
    return bool(_NAME.match(text)) and "--" not in text and ".." not in text


def find_recorded(text: str) -> AddedModel | None:
    """What was added as ``owner/name[@revision]``; ``None`` of what was not. Raises ``WeightsError``."""
    name, _, revision = text.partition("@")
    added = read_record().get(name)
    return added if added is not None and revision in {"", added.revision, added.commit} else None


def find_added(text: str) -> Path | None:
    """Folder of ``owner/name[@revision]`` by the record, else by the Hugging Face cache; ``None`` where neither has it.

    huggingface_hub is imported for a name that is not in the record, and for no other.
    """
    name, _, revision = text.partition("@")
    if not is_hub_name(name):
        return None
    added = find_recorded(text)
    if added is not None and (Path(added.folder) / "config.json").is_file():
        return Path(added.folder)
    return _find_cached(name, revision or _MAIN)


def _find_cached(name: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  imported for a name not in the record alone
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[f"*{_WEIGHTS_END}", _INDEX, *_NEEDED],
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
    except (OSError, HFValidationError):  # not there, or a part of it
        return None
    folder = Path(found)
    return folder if all((folder / needed).is_file() for needed in _NEEDED) else None


def find_offer(text: str) -> Offer:
    """What the hub has under ``owner/name[@revision]``. Raises ``WeightsError``."""
    name, revision = parse_name(text)
    _prepare_hub()
    from huggingface_hub import HfApi, constants  # noqa: PLC0415  only who asks the hub pays for it

    with _explained(name, revision):
        info = HfApi(library_name="fimserver").model_info(name, revision=revision, files_metadata=True)
    if info.sha is None or not _COMMIT.match(info.sha):
        msg = f"{constants.ENDPOINT} does not say which commit {name} is at; is HF_ENDPOINT a hub?"
        raise WeightsError(msg)
    repository = Path(constants.HF_HUB_CACHE).expanduser().absolute() / f"models--{name.replace('/', '--')}"
    return Offer(
        name=name,
        revision=revision,
        commit=info.sha,
        licence=_licence_of(info),
        changed=info.last_modified.date().isoformat() if info.last_modified else "unknown",
        is_gated=bool(info.gated),
        page=f"{constants.ENDPOINT}/{name}",
        files=_choose_files(name, info.siblings or []),
        folder=repository,
        free_bytes=_free_bytes(repository),
    )


def _licence_of(info: Any) -> str:
    card = info.card_data
    named = [str(v) for key in ("license", "license_name", "license_link") if card and (v := card.get(key))]
    if not named:
        named = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return ", ".join(named) or "not named; read its page"


def _choose_files(name: str, siblings: list[Any]) -> tuple[HubFile, ...]:
    """The files that are of use, of the repository's own folder. Raises ``WeightsError`` where it is no model."""
    names = {s.rfilename for s in siblings}
    if not any(n.endswith(_WEIGHTS_END) and "/" not in n for n in names):
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        has = f" ({pickles[0]} is a pickle file, which can run code and is never loaded)" if pickles else ""
        msg = f"{name} has no safetensors files{has}; choose a repository that has"
        raise WeightsError(msg)
    if lacking := [n for n in _NEEDED if n not in names]:
        msg = f"{name} has no {lacking[0]}; choose a repository of a whole model"
        raise WeightsError(msg)
    chosen = []
    for s in siblings:
        if s.rfilename in _SMALL or (s.rfilename.endswith(_WEIGHTS_END) and "/" not in s.rfilename):
            blob = s.lfs.sha256 if s.lfs else s.blob_id
            chosen.append(HubFile(s.rfilename, s.size or 0, blob or "", is_large=s.lfs is not None))
    return tuple(sorted(chosen, key=lambda file: file.name))


def add_model(offer: Offer, report: Report = lambda _what, _done, _all: None) -> AddedModel:
    """Fetch what is missing of an offer, hold it against the class, and write it down. Raises ``WeightsError``."""
    if offer.missing_bytes > max(offer.free_bytes - _SPARE_BYTES, 0):
        msg = (
            f"{offer.name} needs {to_gigabytes(offer.missing_bytes)} more, and {to_gigabytes(offer.free_bytes)} "
            f"are free in {offer.folder.parent}; free some, or set HF_HUB_CACHE to a folder on another disk"
        )
        raise WeightsError(msg)
    weights = [file for file in offer.files if file.name.endswith(_WEIGHTS_END)]
    with _explained(offer.name, offer.revision):
        small = [file.name for file in offer.files if file not in weights]
        folder = _snapshot(offer, small)
        _check_config(offer, folder)
        _fetch_weights(offer, weights, report)
        folder = _snapshot(offer, [file.name for file in offer.files])
        report("checking", offer.num_bytes, offer.num_bytes)
        _check_weights(folder)
        if not _COMMIT.match(offer.revision):  # so that others, too, find it by its branch and without a network
            _write(offer.folder / "refs" / offer.revision, offer.commit)
    added = AddedModel(offer.name, offer.revision, offer.commit, str(folder))
    _change_record(lambda record: {**record, offer.name: added})
    return added


def _snapshot(offer: Offer, names: list[str]) -> Path:
    """The snapshot's folder with these files in it, fetched where the cache has them not."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()  # ours counts bytes of all files
    return Path(
        snapshot_download(offer.name, revision=offer.commit, allow_patterns=names, library_name="fimserver")
    ).absolute()


def _check_config(offer: Offer, folder: Path) -> None:
    from fimserver.engine.known import find_known_metadata  # noqa: PLC0415
    from fimserver.engine.weights import METADATA_FILE, read_config, read_metadata  # noqa: PLC0415  imports torch

    read_config(folder)  # the class and the quantization
    if not (folder / METADATA_FILE).exists() and find_known_metadata(read_json(folder / "config.json")) is None:
        msg = f"{offer.name} has no {METADATA_FILE}, and its config is none of the known models'; it cannot be served"
        raise WeightsError(msg)
    read_metadata(folder)


def _check_weights(folder: Path) -> None:
    from fimserver.engine.checkpoint import Checkpoint  # noqa: PLC0415
    from fimserver.engine.weights import expected_shapes, read_config  # noqa: PLC0415

    Checkpoint.open(folder, expected_shapes(read_config(folder)))


def _fetch_weights(offer: Offer, weights: list[HubFile], report: Report) -> None:
    total = sum(file.num_bytes for file in weights)
    before = 0
    for file in weights:
        blob = offer.folder / "blobs" / file.blob
        report(file.name, before, total)
        if file.is_large and not blob.exists():  # git's own files are small, and come with the snapshot
            _fetch_file(offer, file, blob, partial(_report_file, report, file.name, before, total))
        before += file.num_bytes
        report(file.name, before, total)


def _report_file(report: Report, name: str, before: int, total: int, done: int) -> None:
    report(name, before + done, total)


def _fetch_file(offer: Offer, file: HubFile, blob: Path, report: Callable[[int], None]) -> None:
    """Go on with a partial file, or begin one; it becomes a blob when its SHA-256 is the hub's."""
    from filelock import FileLock  # noqa: PLC0415
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    part = _partial_file(offer.folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    lock = offer.folder.parent / ".locks" / offer.folder.name / f"{file.blob}.lock"  # huggingface_hub's own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return  # another process was quicker
        with part.open("ab") as stream:
            if stream.tell() > file.num_bytes:
                stream.truncate(0)
            begun = stream.tell()
            report(begun)
            http_get(
                hf_hub_url(offer.name, file.name, revision=offer.commit),
                stream,
                resume_size=begun,
                headers={**build_hf_headers(library_name="fimserver"), "Accept-Encoding": "identity"},
                expected_size=file.num_bytes,
                tqdm_class=_to_bar(begun, report),
            )
        with part.open("rb") as written:
            digest = hashlib.sha256()
            while piece := written.read(_READ_BYTES):
                digest.update(piece)
        if digest.hexdigest() != file.blob:
            part.unlink()
            msg = f"{file.name} came damaged, its SHA-256 is not the hub's; it was thrown away, run the command again"
            raise WeightsError(msg)
        part.replace(blob)


def _to_bar(begun: int, report: Callable[[int], None]) -> Any:
    """What huggingface_hub takes for a progress bar, and tells how many bytes came."""
    done = begun

    class Bar:
        def __init__(self, *_args: Any, **_options: Any) -> None: ...

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_error: object) -> None: ...

        def close(self) -> None: ...

        def update(self, num_bytes: float | None = 1) -> None:
            nonlocal done
            done += int(num_bytes or 0)
            report(done)

    return Bar


def _partial_file(folder: Path, file: HubFile) -> Path:
    return folder / "blobs" / f"{file.blob}.fimserver.incomplete"


def _free_bytes(folder: Path) -> int:
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    return shutil.disk_usage(existing).free


def _prepare_hub() -> None:
    """Before huggingface_hub is first imported: no telemetry, and plain HTTP, which can go on where it stopped."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_XET"] = "1"


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """Errors of the hub and of the network as ``WeightsError`` that says what to do."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    endpoint = constants.ENDPOINT
    again = "the same command goes on where it stopped"
    token = "then log in with `hf auth login`, or set HF_TOKEN"  # noqa: S105  a remedy
    try:
        yield
    except errors.HFValidationError as error:
        msg = f"{name!r} is no name of the hub; write owner/name"
        raise WeightsError(msg) from error
    except errors.GatedRepoError as error:
        msg = f"{name} is gated: accept its licence on {endpoint}/{name}, {token}"
        raise WeightsError(msg) from error
    except errors.RevisionNotFoundError as error:
        msg = f"{name} has no revision {revision!r}; its page lists them: {endpoint}/{name}/tree/{_MAIN}"
        raise WeightsError(msg) from error
    except errors.RepositoryNotFoundError as error:
        msg = f"{endpoint} has no model {name}; check the name. If it is private, ask for access, {token}"
        raise WeightsError(msg) from error
    except errors.OfflineModeIsEnabled as error:
        msg = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be fetched; unset it for this command"
        raise WeightsError(msg) from error
    except errors.LocalEntryNotFoundError as error:  # what a snapshot makes of a network that fails
        msg = f"{endpoint} cannot be reached ({_first_line(error)}); check the network, {again}"
        raise WeightsError(msg) from error
    except errors.HfHubHTTPError as error:
        msg = f"{endpoint} answered {error.response.status_code}; try later, {again}"
        raise WeightsError(msg) from error
    except errors.HTTPError as error:  # its HTTP library's, whichever that is
        msg = f"{endpoint} cannot be reached, or the connection broke ({_first_line(error)}); {again}"
        raise WeightsError(msg) from error
    except OSError as error:
        msg = f"{name} cannot be kept ({_first_line(error)}); mend that, {again}"
        raise WeightsError(msg) from error


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def list_models() -> list[ListedModel]:
    """Shipped, then added, then known ones that were not added."""
    shipped = [
        ListedModel(name, "shipped", _folder_bytes(SHIPPED_MODELS / name), str(SHIPPED_MODELS / name))
        for name in shipped_names()
    ]
    record = read_record()
    added = [
        ListedModel(a.name, "added", _folder_bytes(Path(a.folder)), a.folder, a.commit)
        for a in sorted(record.values(), key=lambda a: a.name)
    ]
    known = [
        ListedModel(fact["name"], "known", fact["file_bytes"], None)
        for _, facts in read_known()
        for fact in facts
        if is_hub_name(fact["name"]) and fact["name"] not in record
    ]
    return [*shipped, *added, *known]


def _folder_bytes(folder: Path) -> int | None:
    """Size of the files in a folder; ``None`` where it is gone."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else None


def find_removal(name: str) -> Removal:
    """What there is to remove under a name: the revision that was added, or all that the cache has of it.

    Raises ``WeightsError`` where neither the record nor the cache has it.
    """
    added = read_record().get(name)
    _prepare_hub()
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
        msg = f"{name} was not added; `fimserver model list` shows what was"
        raise WeightsError(msg)
    strategy = found.delete_revisions(*commits) if found and commits else None

    def execute() -> None:
        _change_record(lambda record: {key: value for key, value in record.items() if key != name})
        if strategy:
            strategy.execute()

    folder = cache / f"models--{name.replace('/', '--')}"
    return Removal(name, strategy.expected_freed_size if strategy else 0, folder, execute)


def record_file() -> Path:
    """Where it is written down what was added."""
    return data_folder() / "models.json"


def read_record() -> dict[str, AddedModel]:
    """What was added, by name. Raises ``WeightsError`` where the file is none of ours."""
    path = record_file()
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: AddedModel(name=name, **value) for name, value in values["models"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        msg = (
            f"{path} cannot be read ({type(error).__name__}); delete it, and add the models again: no file comes twice"
        )
        raise WeightsError(msg) from error


def _change_record(change: Callable[[dict[str, AddedModel]], Mapping[str, AddedModel]]) -> None:
    from filelock import FileLock  # noqa: PLC0415

    path = record_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        models = {}
        for name, added in sorted(change(read_record()).items()):
            models[name] = {key: value for key, value in asdict(added).items() if key != "name"}
        _write(path, json.dumps({"models": models}, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def to_gigabytes(num_bytes: int | None) -> str:
    """A size as a person reads it; GB are 1e9 bytes."""
    if num_bytes is None:
        return "unknown size"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 100_000_000 else f"{num_bytes / 1e6:.1f} MB"  # noqa: PLR2004
