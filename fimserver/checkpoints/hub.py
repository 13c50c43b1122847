"""Download a published model from the hub.

    find_offer   what would be downloaded, its licence and size: two requests to the hub, nothing stored
    add_model    small files, a check of the config, weights, a check of their headers, the record

Files are stored in the Hugging Face cache, in huggingface_hub's layout, so that other programs share them.
huggingface_hub discards a partial file when its process ends; here weights go to a partial file next to the blobs, the
next run resumes it, and its SHA-256 is compared with the hub's before the file gets its final name.

The caller passes the two checks (``engine/loading/weights.py`` has them), so that this module does not need torch.

Knows:   the hub, its cache, the record.  Never: documents, tensors; no network outside of find_offer and add_model.
Raises:  ``WeightsError`` with the remedy.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fimserver.checkpoints.installed import (
    INDEX_FILE,
    MAIN_BRANCH,
    NEEDED_FILES,
    WEIGHTS_SUFFIX,
    AddedModel,
    change_record,
    is_hub_name,
    prepare_hub,
    to_gigabytes,
    write_whole,
)
from fimserver.checkpoints.known import find_known_fact
from fimserver.checkpoints.metadata import check_metadata
from fimserver.errors import WeightsError

Report = Callable[[str, int, int], None]  # description, bytes done, total bytes
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_SMALL = (
    *NEEDED_FILES,
    INDEX_FILE,
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
_SPARE_BYTES = 2**28  # of disk space to leave free


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository; ``blob`` is its name in the cache: SHA-256 of a large file, git's id of a small one."""

    name: str
    num_bytes: int
    blob: str
    is_large: bool


@dataclass(frozen=True, slots=True)
class Offer:
    """A model on the hub: what would be downloaded, and to where."""

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
        """Total size on disk."""
        return sum(file.num_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes not on disk yet; a partial file counts with its rest."""
        return sum(file.num_bytes - self._present_bytes(file) for file in self.files)

    def _present_bytes(self, file: HubFile) -> int:
        if (self.folder / "blobs" / file.blob).exists():
            return file.num_bytes
        part = _partial_file(self.folder, file)
        return min(part.stat().st_size, file.num_bytes) if part.exists() else 0


def parse_name(text: str) -> tuple[str, str]:
    """Split ``owner/name`` or ``owner/name@revision`` into name and revision. Raises ``WeightsError``."""
    name, at, revision = text.partition("@")
    if not is_hub_name(name) or (at and not revision):
        msg = f"{text!r} is not a name on the hub; write owner/name, or owner/name@revision"
        raise WeightsError(msg)
    return name, revision or MAIN_BRANCH


def find_offer(text: str) -> Offer:
    """Return the hub's offer under ``owner/name[@revision]``. Raises ``WeightsError``."""
    name, revision = parse_name(text)
    prepare_hub()
    from huggingface_hub import HfApi, constants  # noqa: PLC0415  slow to import

    with _explained(name, revision):
        info = HfApi(library_name="fimserver").model_info(name, revision=revision, files_metadata=True)
    if info.sha is None or not _COMMIT.match(info.sha):
        msg = f"{constants.ENDPOINT} does not report the commit of {name}; check that HF_ENDPOINT is a hub"
        raise WeightsError(msg)
    repository = Path(constants.HF_HUB_CACHE).expanduser().absolute() / f"models--{name.replace('/', '--')}"
    return Offer(
        name=name,
        revision=revision,
        commit=info.sha,
        licence=_licence_of(name, info),
        changed=info.last_modified.date().isoformat() if info.last_modified else "unknown",
        is_gated=bool(info.gated),
        page=f"{constants.ENDPOINT}/{name}",
        files=_choose_files(name, info.siblings or []),
        folder=repository,
        free_bytes=_free_bytes(repository),
    )


def _licence_of(name: str, info: Any) -> str:
    """Return the licence that the hub names, else that of a known model."""
    card = info.card_data
    named = [str(v) for key in ("license", "license_name", "license_link") if card and (v := card.get(key))]
    if not named:
        named = [value for tag in info.tags or [] if (value := tag.removeprefix("license:")) not in {"", tag}]
    if not named and (fact := find_known_fact(name)) is not None:
        return str(fact["licence"])
    return ", ".join(named) or "not named; read its page"


def _choose_files(name: str, siblings: list[Any]) -> tuple[HubFile, ...]:
    """Choose the needed files in the repository's root. Raises ``WeightsError`` if it is not a model."""
    names = {s.rfilename for s in siblings}
    if not any(n.endswith(WEIGHTS_SUFFIX) and "/" not in n for n in names):
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        has = f" ({pickles[0]} is a pickle file, which can run code and is never loaded)" if pickles else ""
        msg = f"{name} has no safetensors files{has}; choose a repository with safetensors"
        raise WeightsError(msg)
    if lacking := [n for n in NEEDED_FILES if n not in names]:
        msg = f"{name} has no {lacking[0]}; choose a repository with a complete model"
        raise WeightsError(msg)
    chosen = []
    for s in siblings:
        if s.rfilename in _SMALL or (s.rfilename.endswith(WEIGHTS_SUFFIX) and "/" not in s.rfilename):
            blob = s.lfs.sha256 if s.lfs else s.blob_id
            chosen.append(HubFile(s.rfilename, s.size or 0, blob or "", is_large=s.lfs is not None))
    return tuple(sorted(chosen, key=lambda file: file.name))


def add_model(
    offer: Offer,
    *,
    check_config: Callable[[Path], object],
    check_weights: Callable[[Path], object],
    report: Report = lambda _what, _done, _all: None,
) -> AddedModel:
    """Download the missing files of an offer, check them, and record the model. Raises ``WeightsError``."""
    if offer.missing_bytes > max(offer.free_bytes - _SPARE_BYTES, 0):
        msg = (
            f"{offer.name} needs {to_gigabytes(offer.missing_bytes)} more, and {to_gigabytes(offer.free_bytes)} "
            f"are free in {offer.folder.parent}; free some, or set HF_HUB_CACHE to a folder on another disk"
        )
        raise WeightsError(msg)
    weights = [file for file in offer.files if file.name.endswith(WEIGHTS_SUFFIX)]
    with _explained(offer.name, offer.revision):
        small = [file.name for file in offer.files if file not in weights]
        folder = _snapshot(offer, small)
        _check_config(offer, folder, check_config)
        _fetch_weights(offer, weights, report)
        folder = _snapshot(offer, [file.name for file in offer.files])
        report("checking", offer.num_bytes, offer.num_bytes)
        check_weights(folder)
        if not _COMMIT.match(offer.revision):  # so that other programs find it by its branch without a network
            write_whole(offer.folder / "refs" / offer.revision, offer.commit)
    added = AddedModel(offer.name, offer.revision, offer.commit, str(folder))
    change_record(lambda record: {**record, offer.name: added})
    return added


def _snapshot(offer: Offer, names: list[str]) -> Path:
    """Return the snapshot's folder with these files, downloading those that the cache lacks."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()  # our own bar counts bytes of all files
    return Path(
        snapshot_download(offer.name, revision=offer.commit, allow_patterns=names, library_name="fimserver")
    ).absolute()


def _check_config(offer: Offer, folder: Path, check_config: Callable[[Path], object]) -> None:
    check_config(folder)
    check_metadata(folder, offer.name)


def _fetch_weights(offer: Offer, weights: list[HubFile], report: Report) -> None:
    total = sum(file.num_bytes for file in weights)
    before = 0
    for file in weights:
        blob = offer.folder / "blobs" / file.blob
        report(file.name, before, total)
        if file.is_large and not blob.exists():  # small files are in git and come with the snapshot
            _fetch_file(offer, file, blob, partial(_report_file, report, file.name, before, total))
        before += file.num_bytes
        report(file.name, before, total)


def _report_file(report: Report, name: str, before: int, total: int, done: int) -> None:
    report(name, before + done, total)


def _fetch_file(offer: Offer, file: HubFile, blob: Path, report: Callable[[int], None]) -> None:
    """Resume or start a partial file; it becomes a blob if its SHA-256 is the hub's."""
    from filelock import FileLock  # noqa: PLC0415
    from huggingface_hub import hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    part = _partial_file(offer.folder, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    # the path of huggingface_hub's own lock
    lock = offer.folder.parent / ".locks" / offer.folder.name / f"{file.blob}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if blob.exists():
            return  # another process has downloaded it
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
            msg = f"{file.name} was damaged in transfer (wrong SHA-256) and was deleted; run the command again"
            raise WeightsError(msg)
        part.replace(blob)


def _to_bar(begun: int, report: Callable[[int], None]) -> Any:
    """Return a progress bar for huggingface_hub that reports the bytes received."""
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


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """Convert errors of the hub and the network to ``WeightsError`` with the remedy."""
    from huggingface_hub import constants, errors  # noqa: PLC0415

    endpoint = constants.ENDPOINT
    again = "the same command resumes where it stopped"
    token = "then log in with `hf auth login`, or set HF_TOKEN"  # noqa: S105  a remedy
    try:
        yield
    except errors.HFValidationError as error:
        msg = f"{name!r} is not a name on the hub; write owner/name"
        raise WeightsError(msg) from error
    except errors.GatedRepoError as error:
        msg = f"{name} is gated: accept its licence on {endpoint}/{name}, {token}"
        raise WeightsError(msg) from error
    except errors.RevisionNotFoundError as error:
        msg = f"{name} has no revision {revision!r}; its page lists them: {endpoint}/{name}/tree/{MAIN_BRANCH}"
        raise WeightsError(msg) from error
    except errors.RepositoryNotFoundError as error:
        msg = f"{endpoint} has no model {name}; check the name. If it is private, ask for access, {token}"
        raise WeightsError(msg) from error
    except errors.OfflineModeIsEnabled as error:
        msg = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be downloaded; unset it for this command"
        raise WeightsError(msg) from error
    except errors.LocalEntryNotFoundError as error:  # snapshot_download raises this when the network fails
        msg = f"{endpoint} cannot be reached ({_first_line(error)}); check the network, {again}"
        raise WeightsError(msg) from error
    except errors.HfHubHTTPError as error:
        msg = f"{endpoint} answered {error.response.status_code}; try later, {again}"
        raise WeightsError(msg) from error
    except errors.HTTPError as error:  # raised by any of its HTTP libraries
        msg = f"{endpoint} cannot be reached, or the connection broke ({_first_line(error)}); {again}"
        raise WeightsError(msg) from error
    except OSError as error:
        msg = f"{name} cannot be stored ({_first_line(error)}); fix that, {again}"
        raise WeightsError(msg) from error


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
