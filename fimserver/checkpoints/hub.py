"""Download a published model from the hub, which is not trusted: what it says is checked before it decides anything.

    find_offer   what would be downloaded, its licence and size: two requests to the hub, nothing stored
    add_model    small files, a check of the config, weights, a check of their headers, the record

Files are stored in the Hugging Face cache, in huggingface_hub's layout, so that other programs share them.
huggingface_hub discards a partial file when its process ends, and names a file by what the answer to its request says.
Here every file goes to a partial file next to the blobs, of no more than the announced bytes; the next run resumes it,
and its hash is compared with the announced one before it gets its final name. A file that the cache has already is
read and compared too.

The caller passes the two checks (``engine/loading/weights.py`` has them), so that this module does not need torch.

Knows:   the hub, its cache, the record.  Never: documents, tensors; no network outside of find_offer and add_model.
Raises:  ``WeightsError`` with the remedy.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fimserver.checkpoints.folder import most_bytes
from fimserver.checkpoints.installed import (
    INDEX_FILE,
    MAIN_BRANCH,
    NEEDED_FILES,
    WEIGHTS_SUFFIX,
    AddedModel,
    change_record,
    is_hub_name,
    is_revision,
    prepare_hub,
    to_gigabytes,
    write_whole,
)
from fimserver.checkpoints.known import find_known_fact
from fimserver.checkpoints.metadata import check_metadata
from fimserver.errors import WeightsError
from fimserver.text import to_printable

Report = Callable[[str, int, int], None]  # description, bytes done, total bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.+=-]*", re.ASCII)
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows
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
_OTHER = "do not use it, or ask its owner to upload it again"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LONGEST_NAME = 200  # characters
_MOST_FILES = 4096
_LONGEST_SHOWN = 300  # characters of a text of the hub
_MOST_WEIGHTS_BYTES = 50_000_000_000  # of one file: the hub sends no larger one over HTTP
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
        if _size_of(self.folder / "blobs" / file.blob) == file.num_bytes:
            return file.num_bytes
        return min(_size_of(_partial_file(self.folder, file)) or 0, file.num_bytes)


def parse_name(text: str) -> tuple[str, str]:
    """Split ``owner/name`` or ``owner/name@revision`` into name and revision. Raises ``WeightsError``."""
    name, at, revision = text.partition("@")
    if not is_hub_name(name) or (at and not is_revision(revision)):
        msg = f"{text!r} is not a name on the hub; write owner/name, or owner/name@revision"
        raise WeightsError(msg)
    return name, revision or MAIN_BRANCH


def find_offer(text: str) -> Offer:
    """Return the hub's offer under ``owner/name[@revision]``. Raises ``WeightsError``."""
    name, revision = parse_name(text)
    prepare_hub()
    from huggingface_hub import HfApi, constants  # noqa: PLC0415  slow to import
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    with _explained(name, revision):
        try:
            info = HfApi(library_name="fimserver").model_info(name, revision=revision, files_metadata=True)
        except HFValidationError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            msg = f"{constants.ENDPOINT} describes {name} in a form that no hub has; check that HF_ENDPOINT is a hub"
            raise WeightsError(msg) from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        msg = f"{constants.ENDPOINT} does not report the commit of {name}; check that HF_ENDPOINT is a hub"
        raise WeightsError(msg)
    repository = Path(constants.HF_HUB_CACHE).expanduser().absolute() / f"models--{name.replace('/', '--')}"
    return Offer(
        name=name,
        revision=revision,
        commit=info.sha,
        licence=_shorten(_licence_of(name, info)),
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
        named = [
            value
            for tag in info.tags or []
            if isinstance(tag, str) and (value := tag.removeprefix("license:")) not in {"", tag}
        ]
    if not named and (fact := find_known_fact(name)) is not None:
        return str(fact["licence"])
    return ", ".join(named) or "not named; read its page"


def _choose_files(name: str, siblings: list[Any]) -> tuple[HubFile, ...]:
    """Choose the needed files in the repository's root. Raises ``WeightsError`` if it is not a model."""
    names = {s.rfilename for s in siblings if isinstance(s.rfilename, str)}
    if not any(n.endswith(WEIGHTS_SUFFIX) and "/" not in n for n in names):
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        has = f" ({_shorten(pickles[0])} is a pickle file, which can run code and is never loaded)" if pickles else ""
        msg = f"{name} has no safetensors files{has}; choose a repository with safetensors"
        raise WeightsError(msg)
    if lacking := [n for n in NEEDED_FILES if n not in names]:
        msg = f"{name} has no {lacking[0]}; choose a repository with a complete model"
        raise WeightsError(msg)
    chosen: dict[str, HubFile] = {}
    for s in siblings:
        if isinstance(s.rfilename, str) and (
            s.rfilename in _SMALL or (s.rfilename.endswith(WEIGHTS_SUFFIX) and "/" not in s.rfilename)
        ):
            file = _to_file(name, s)
            if file.name in chosen or len(chosen) >= _MOST_FILES:
                msg = f"{name} lists {file.name} twice, or more than {_MOST_FILES} files; {_OTHER}"
                raise WeightsError(msg)
            chosen[file.name] = file
    return tuple(sorted(chosen.values(), key=lambda file: file.name))


def _to_file(name: str, sibling: Any) -> HubFile:
    """Return a file as the hub announces it, its name, size and hash checked by form. Raises ``WeightsError``."""
    file_name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
    shown = f"{name}: the hub announces {_shorten(repr(file_name))}"
    if not _FILE_NAME.fullmatch(file_name) or _RESERVED.fullmatch(file_name) or len(file_name) > _LONGEST_NAME:
        msg = f"{shown}, which cannot be the name of a file on every system; {_OTHER}"
        raise WeightsError(msg)
    most = _MOST_WEIGHTS_BYTES if file_name.endswith(WEIGHTS_SUFFIX) else most_bytes(file_name)
    if type(size) is not int or not 0 <= size <= most:
        msg = f"{shown} with a size of {_shorten(repr(size))} bytes, not from 0 to {most}; {_OTHER}"
        raise WeightsError(msg)
    blob, form = (lfs.sha256, _SHA256) if lfs else (sibling.blob_id, _GIT_ID)
    if not isinstance(blob, str) or not form.fullmatch(blob):
        msg = f"{shown} with the hash {_shorten(repr(blob))}, which is not one; {_OTHER}"
        raise WeightsError(msg)
    return HubFile(file_name, size, blob, is_large=bool(lfs))


def _shorten(text: str) -> str:
    """Return a text of the hub as one line for display."""
    shown = to_printable(text)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


def add_model(
    offer: Offer,
    *,
    check_config: Callable[[Path], object],
    check_weights: Callable[[Path], object],
    report: Report = lambda _what, _done, _all: None,
) -> AddedModel:
    """Download the missing files of an offer, check them, and record the model. Raises ``WeightsError``."""
    free = min(offer.free_bytes, _free_bytes(offer.folder))
    if offer.missing_bytes > max(free - _SPARE_BYTES, 0):
        msg = (
            f"{offer.name} needs {to_gigabytes(offer.missing_bytes)} more, and {to_gigabytes(free)} "
            f"are free in {offer.folder.parent}; free some, or set HF_HUB_CACHE to a folder on another disk"
        )
        raise WeightsError(msg)
    weights = [file for file in offer.files if file.name.endswith(WEIGHTS_SUFFIX)]
    small = [file for file in offer.files if file not in weights]
    folder = (offer.folder / "snapshots" / offer.commit).absolute()
    with _explained(offer.name, offer.revision):
        _fetch_files(offer, folder, small, lambda _what, _done, _all: None)
        _check_config(offer, folder, check_config)
        _fetch_files(offer, folder, weights, report)
        report("checking", offer.num_bytes, offer.num_bytes)
        check_weights(folder)
        if not _COMMIT.fullmatch(offer.revision):  # so that other programs find it by its branch without a network
            write_whole(offer.folder / "refs" / offer.revision, offer.commit)
    added = AddedModel(offer.name, offer.revision, offer.commit, str(folder))
    change_record(lambda record: {**record, offer.name: added})
    return added


def _check_config(offer: Offer, folder: Path, check_config: Callable[[Path], object]) -> None:
    check_config(folder)
    check_metadata(folder, offer.name)


def _fetch_files(offer: Offer, folder: Path, files: list[HubFile], report: Report) -> None:
    """Fetch the files that the cache lacks, or has with other content, and link them in the snapshot's folder."""
    total = sum(file.num_bytes for file in files)
    before = 0
    for file in files:
        blob = offer.folder / "blobs" / file.blob
        report(file.name, before, total)
        _fetch_file(offer, file, blob, partial(_report_file, report, file.name, before, total))
        _link(blob, folder / file.name)
        before += file.num_bytes
        report(file.name, before, total)


def _report_file(report: Report, name: str, before: int, total: int, done: int) -> None:
    report(name, before + done, total)


def _link(blob: Path, place: Path) -> None:
    """Let a name in the snapshot's folder stand for a blob: a link as huggingface_hub makes it, or else a copy."""
    if place.exists() and place.samefile(blob):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except (OSError, NotImplementedError):  # Windows, for users without the right
        try:
            place.hardlink_to(blob)
        except (OSError, NotImplementedError):
            shutil.copyfile(blob, place)


def _fetch_file(offer: Offer, file: HubFile, blob: Path, report: Callable[[int], None]) -> None:
    """Resume or start a partial file; it becomes a blob if its size and hash are those that the hub announced."""
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
        is_whole = blob.is_file() and blob.stat().st_size == file.num_bytes  # or a link to one: its hash is compared
        if is_whole and _hash(file, blob, report) == file.blob:
            return  # from an earlier run, another process or another program
        if _size_of(part) is None:
            part.unlink(missing_ok=True)  # a link or a pipe, which is not ours
        try:
            with part.open("ab") as stream:
                if stream.tell() > file.num_bytes:
                    stream.truncate(0)
                    stream.seek(0)
                begun = stream.tell()
                report(begun)
                http_get(
                    hf_hub_url(offer.name, file.name, revision=offer.commit),
                    _Limited(stream, file),  # type: ignore[arg-type]
                    resume_size=begun,
                    headers={**build_hf_headers(library_name="fimserver"), "Accept-Encoding": "identity"},
                    expected_size=file.num_bytes,
                    tqdm_class=_to_bar(begun, report),
                )
        except WeightsError:
            part.unlink(missing_ok=True)
            raise
        if _hash(file, part) != file.blob:
            part.unlink()
            what = "SHA-256" if file.is_large else "git id"
            msg = f"{file.name} was damaged in transfer (wrong {what}) and was deleted; run the command again"
            raise WeightsError(msg)
        part.replace(blob)


class _Limited:
    """A file that takes no more bytes than the hub announced; with the methods that ``http_get`` uses."""

    def __init__(self, stream: BinaryIO, file: HubFile) -> None:
        self._stream, self._file = stream, file
        self.tell, self.seek, self.truncate = stream.tell, stream.seek, stream.truncate

    def write(self, content: bytes) -> int:
        """Write bytes, unless they are too many. Raises ``WeightsError``."""
        if self.tell() + len(content) > self._file.num_bytes:
            msg = (
                f"{self._file.name} is longer than the {self._file.num_bytes} bytes that the hub announced, and was "
                "deleted; run the command again, or do not use this model"
            )
            raise WeightsError(msg)
        return self._stream.write(content)


def _size_of(path: Path) -> int | None:
    """Return the size of a regular file, or ``None``: a link among the blobs could lead anywhere."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _hash(file: HubFile, path: Path, report: Callable[[int], None] = lambda _done: None) -> str:
    """Return the hash of a file's content in the form of its blob: SHA-256, or git's id of this size."""
    if file.is_large:
        digest = hashlib.sha256()
    else:
        is_sha1 = len(file.blob) == 40  # noqa: PLR2004  hex digits; git uses SHA-256 in some repositories
        digest = hashlib.sha1(usedforsecurity=False) if is_sha1 else hashlib.sha256()
        digest.update(b"blob %d\0" % file.num_bytes)
    done = 0
    with path.open("rb") as stream:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
            report(done := done + len(piece))
    return digest.hexdigest()


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
    return _shorten(lines[0]) if lines else type(error).__name__
