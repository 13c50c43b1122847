"""Build the corpus of ``fimserver corpus``: the Python files that the shipped model is trained on.

They come from packages of PyPI, each at one version, from the running Python's standard library and from the
installed torch. All have permissive licences except hypothesis, which is under the MPL-2.0, a weak copyleft; the
manifest says so. The licence stated in a wheel has to be the one in this table.

Left out: files that are very small or very large, have very long lines, are generated or do not parse; all but the
first copy of a text. The packages and modules of the two held-out lists are kept apart, for measuring: the model is
trained neither on them nor on copies of them in other packages. ``read_documents`` refuses a corpus that violates this.

A folder holds ``manifest.json``, ``documents.jsonl.xz`` (training) and ``held_out.jsonl.xz``. The files are ordered
by name, which compresses best; ``read_documents`` shuffles them, the same way each time.

Knows:  wheels, pip, the standard library's folder.  Never: tokens, models. It imports the standard library alone.
"""

import ast
import contextlib
import dataclasses
import email
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fimserver.errors import FimserverError
from fimserver.paths import OUTSIDE, cache_folder

if TYPE_CHECKING:
    from email.message import Message  # generic for the type checker only

HELD_OUT_PACKAGES = ("tornado", "flask", "aiohttp", "werkzeug", "click")  # never trained on
HELD_OUT_MODULES = ("argparse", "textwrap", "heapq", "csv", "zipfile", "shelve")  # of the standard library
PYTHON = "python"  # package name of the standard library
MANIFEST_FILE, DOCUMENTS_FILE, HELD_OUT_FILE = "manifest.json", "documents.jsonl.xz", "held_out.jsonl.xz"

_FORMAT = 1
_SHUFFLE_SEED = 0
_PRESET = 2  # xz
_FEWEST_BYTES, _MOST_BYTES, _LONGEST_LINE = 400, 300_000, 1000
_WEAK_COPYLEFT = ("MPL-2.0",)
_AGAIN = "run: fimserver corpus"
Report = Callable[[str, int, int], None]  # (current task, steps done, total steps)


@dataclass(frozen=True, slots=True)
class Pin:
    """A package at one version; ``stated`` is the licence in its metadata, if that differs."""

    name: str
    version: str
    licence: str
    megabytes: float = 0.0  # size of the wheel
    stated: str = ""


PINS = (
    Pin("aiohttp", "3.14.5", "Apache-2.0 AND MIT", 1.9),
    Pin("apache-airflow-core", "3.3.2", "Apache-2.0", 6.9),
    Pin("click", "8.5.1", "BSD-3-Clause", 0.1),
    Pin("django", "5.2.19", "BSD-3-Clause", 8.3),
    Pin("fastapi", "0.165.0", "MIT", 0.2),
    Pin("flask", "3.1.3", "BSD-3-Clause", 0.1),
    Pin("homeassistant", "2024.3.3", "Apache-2.0", 35.4),
    Pin("hypothesis", "6.170.15", "MPL-2.0", 1.2),
    Pin("jax", "0.10.2", "Apache-2.0", 3.2),
    Pin("jinja2", "3.1.6", "BSD-3-Clause", 0.1, "BSD License"),
    Pin("matplotlib", "3.11.2", "PSF-2.0", 9.9, "Python Software Foundation License"),
    Pin("mypy", "2.4.1", "MIT", 15.4),
    Pin("networkx", "3.6.1", "BSD-3-Clause", 2.1),
    Pin("numpy", "2.4.6", "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", 16.9),
    Pin("pandas", "3.1.1", "BSD-3-Clause", 12.4),
    Pin("pydantic", "2.14.3", "MIT", 0.5),
    Pin("pytest", "9.2.0", "MIT", 0.4),
    Pin("rich", "15.0.0", "MIT", 0.3),
    Pin("scikit-learn", "1.9.1", "BSD-3-Clause", 9.3),
    Pin("scipy", "1.17.1", "BSD-3-Clause", 35.3, "BSD License"),
    Pin("sqlalchemy", "2.1.9", "MIT", 4.7),
    Pin("sympy", "1.14.0", "BSD-3-Clause", 6.3, "BSD"),
    Pin("textual", "8.2.8", "MIT", 0.7),
    Pin("tornado", "6.6.1", "Apache-2.0", 0.5),
    Pin("transformers", "5.23.0", "Apache-2.0", 13.3, "Apache 2.0 License"),
    Pin("twisted", "26.10.0", "MIT", 3.3),
    Pin("werkzeug", "3.1.9", "BSD-3-Clause", 0.2),
)
# installed version; its metadata also lists the licences of linked libraries
INSTALLED = (Pin("torch", "", "BSD-3-Clause"),)


@dataclass(frozen=True, slots=True)
class Document:
    r"""One file; ``package`` is a distribution's name, or ``python``; lines end with ``\n``."""

    package: str
    path: str  # in the wheel or the standard library, separated by "/"
    text: str


@dataclass(frozen=True, slots=True)
class Package:
    """The files taken from a package and their licence; the standard library and installed packages have no wheel."""

    name: str
    version: str
    licence: str
    licence_stated: str
    weak_copyleft: bool
    wheel: str | None
    sha256: str | None
    files: int
    characters: int
    held_out_files: int
    held_out_characters: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a corpus; a package's files and characters count training files only, held-out ones are separate."""

    format: int
    python: str
    held_out_packages: tuple[str, ...]
    held_out_modules: tuple[str, ...]
    packages: tuple[Package, ...]

    def licence_of(self, document: Document) -> str:
        """Return the licence of a document."""
        return next(package.licence for package in self.packages if package.name == document.package)


@dataclass(frozen=True, slots=True)
class _Source:
    """A package, its origin, and its Python files: paths with functions that read them."""

    name: str
    version: str
    licence: str
    licence_stated: str
    wheel: str | None
    sha256: str | None
    files: Iterable[tuple[str, Callable[[], bytes]]]


def default_folder() -> Path:
    """Return the default corpus folder."""
    return cache_folder() / "corpus"


def is_held_out(package: str, path: str) -> bool:
    """Return whether a file is of a held-out package or module, of its tests, or of a copy of such a package."""
    place = PurePosixPath(path)
    if package == PYTHON:
        of_tests = place.parts[0] == "test" and len(place.parts) > 1
        name = place.parts[1].removeprefix("test_") if of_tests else place.parts[0]
        if name.removesuffix(".py").rstrip("0123456789") in HELD_OUT_MODULES:
            return True
    return package in HELD_OUT_PACKAGES or any(part in HELD_OUT_PACKAGES for part in place.parts[:-1])


def find_missing(wheels: Path, pins: Sequence[Pin] = PINS) -> list[Pin]:
    """Return the packages whose wheels are not in a folder."""
    return [pin for pin in pins if _find_wheel(wheels, pin) is None]


def build_corpus(  # noqa: PLR0913  tests give small ones
    folder: Path,
    wheels: Path | None = None,
    *,
    pins: Sequence[Pin] = PINS,
    installed: Sequence[Pin] = INSTALLED,
    library: Path | None = None,
    report: Report = lambda _what, _done, _total: None,
) -> Manifest:
    """Download missing wheels, clean all files and write the corpus.

    Wheels are in ``wheels``, or in a folder of that name in the corpus. Raises ``FimserverError`` if pip fails, or if a
    wheel does not match its name or the table.
    """
    wheels = folder / "wheels" if wheels is None else wheels
    missing = find_missing(wheels, pins)
    total = len(missing) + len(pins) + len(installed) + 3  # + the standard library and two files
    step = 0

    def advance(what: str) -> None:
        nonlocal step
        report(what, step, total)
        step += 1

    for pin in missing:
        advance(f"fetching {pin.name}")
        _download(pin, wheels)
    # held-out files first: of equal texts the first is kept
    openers = [functools.partial(_open_wheel, wheels, pin) for pin in pins if pin.name in HELD_OUT_PACKAGES]
    openers.append(functools.partial(_open_library, library or Path(sysconfig.get_paths()["stdlib"])))
    openers += [functools.partial(_open_wheel, wheels, pin) for pin in pins if pin.name not in HELD_OUT_PACKAGES]
    openers += [functools.partial(_open_installed, pin) for pin in installed]
    training: list[Document] = []
    held_out: list[Document] = []
    seen: set[bytes] = set()
    packages = []
    for opener in openers:
        source = opener()
        advance(f"reading {source.name}")
        kept = list(_clean(source, seen))
        apart = [document for document in kept if document.package in HELD_OUT_PACKAGES or _is_held_module(document)]
        # a copy in another package is used neither for training nor for measuring
        taken = [document for document in kept if not is_held_out(document.package, document.path)]
        training += taken
        held_out += apart
        packages.append(_describe(source, taken, apart))
    manifest = Manifest(
        _FORMAT,
        platform.python_version(),
        HELD_OUT_PACKAGES,
        HELD_OUT_MODULES,
        tuple(sorted(packages, key=lambda package: package.name)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in ((DOCUMENTS_FILE, training), (HELD_OUT_FILE, held_out)):
        advance(f"writing {name}")
        _write_documents(folder / name, documents)
    with _replacing(folder / MANIFEST_FILE) as path:
        path.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8")
    report("done", total, total)
    return manifest


def read_documents(folder: Path) -> list[Document]:
    """Return the training documents, shuffled the same way each time.

    Raises ``FimserverError`` if the corpus is missing or broken, or holds a held-out file.
    """
    documents = _read_file(folder / DOCUMENTS_FILE)
    for document in documents:
        if is_held_out(document.package, document.path):
            msg = f"{folder / DOCUMENTS_FILE} holds {document.path} of {document.package}, which is held out; {_AGAIN}"
            raise FimserverError(msg)
    counts = {package.name: package.files for package in read_manifest(folder).packages}
    _check_counts(folder / DOCUMENTS_FILE, documents, counts)
    random.Random(_SHUFFLE_SEED).shuffle(documents)
    return documents


def read_held_out(folder: Path) -> list[Document]:
    """Return the held-out documents, which are only used for measuring, ordered by name.

    Raises ``FimserverError`` if they are missing or broken.
    """
    documents = _read_file(folder / HELD_OUT_FILE)
    counts = {package.name: package.held_out_files for package in read_manifest(folder).packages}
    _check_counts(folder / HELD_OUT_FILE, documents, counts)
    return documents


def read_manifest(folder: Path) -> Manifest:
    """Return a corpus's manifest. Raises ``FimserverError`` if it is missing, broken or of another version."""
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] == _FORMAT:
            return Manifest(
                _FORMAT,
                values["python"],
                tuple(values["held_out_packages"]),
                tuple(values["held_out_modules"]),
                tuple(Package(**package) for package in values["packages"]),
            )
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path, error) from error
    msg = f"{path} is of format {values['format']}, not {_FORMAT}; {_AGAIN}"
    raise FimserverError(msg)


def _describe(source: _Source, training: list[Document], held_out: list[Document]) -> Package:
    return Package(
        name=source.name,
        version=source.version,
        licence=source.licence,
        licence_stated=source.licence_stated,
        weak_copyleft=any(licence in source.licence for licence in _WEAK_COPYLEFT),
        wheel=source.wheel,
        sha256=source.sha256,
        files=len(training),
        characters=sum(len(document.text) for document in training),
        held_out_files=len(held_out),
        held_out_characters=sum(len(document.text) for document in held_out),
    )


def _is_held_module(document: Document) -> bool:
    return document.package == PYTHON and is_held_out(document.package, document.path)


def _clean(source: _Source, seen: set[bytes]) -> Iterator[Document]:
    for path, read in source.files:
        text = clean_text(read())
        if text is None:
            continue
        key = hashlib.sha256(text.encode()).digest()
        if key not in seen:
            seen.add(key)
            yield Document(source.name, path, text)


def clean_text(raw: bytes) -> str | None:
    r"""Return a file's text with ``\n`` line ends, or ``None`` if the file is not useful for training."""
    if not _FEWEST_BYTES <= len(raw) <= _MOST_BYTES:
        return None
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    if max(map(len, text.split("\n"))) > _LONGEST_LINE:
        return None
    head = text[:600].lower()
    if "generated" in head[:400] and "do not edit" in head:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    return text


def _open_wheel(wheels: Path, pin: Pin) -> _Source:
    path = _find_wheel(wheels, pin)
    if path is None:
        msg = f"{wheels} has no wheel of {pin.name} {pin.version}; {_AGAIN}"
        raise FimserverError(msg)
    try:
        with zipfile.ZipFile(path) as wheel:
            names = wheel.namelist()
            about = next(name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = email.message_from_bytes(wheel.read(about))
            python_files = sorted(name for name in names if name.endswith(".py"))
            contents = {name: wheel.read(name) for name in python_files}  # also checks each file's checksum
    except (OSError, zipfile.BadZipFile, StopIteration, NotImplementedError) as error:
        msg = f"{path} is not a complete wheel ({error or 'no METADATA'}); delete it and {_AGAIN}"
        raise FimserverError(msg) from error
    found = (_normal(metadata["Name"] or ""), metadata["Version"])
    if found != (_normal(pin.name), pin.version):
        msg = f"{path} is {found[0]} {found[1]}, not {pin.name} {pin.version}; delete it and {_AGAIN}"
        raise FimserverError(msg)
    stated = _stated_licence(metadata)
    if stated != (pin.stated or pin.licence):
        msg = (
            f"{path} states the licence {stated!r}, and {pin.stated or pin.licence!r} was expected; "
            f"delete it and {_AGAIN}, or check whether its licence permits training and change the table in {__name__}"
        )
        raise FimserverError(msg)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = [(name, functools.partial(contents.__getitem__, name)) for name in python_files]
    return _Source(pin.name, pin.version, pin.licence, stated, path.name, digest, files)


def _open_library(folder: Path) -> _Source:
    apart = {"site-packages", "dist-packages"}
    files = [(path, read) for path, read in _folder_files(folder) if apart.isdisjoint(path.split("/"))]
    if not files:
        msg = f"{folder} holds no source of the standard library; use a Python that includes it"
        raise FimserverError(msg)
    files.sort(key=lambda file: (not is_held_out(PYTHON, file[0]), file[0]))  # of equal texts, keep the held-out one
    return _Source(PYTHON, platform.python_version(), "PSF-2.0", "PSF-2.0", None, None, files)


def _open_installed(pin: Pin) -> _Source:
    spec = importlib.util.find_spec(pin.name)  # does not import it
    if spec is None or not spec.submodule_search_locations:
        msg = f"{pin.name} is not installed; run: {sys.executable} -m pip install {pin.name}"
        raise FimserverError(msg)
    folder = Path(spec.submodule_search_locations[0])
    distribution = importlib.metadata.distribution(pin.name)
    stated = _stated_licence(email.message_from_string(distribution.read_text("METADATA") or ""))
    files = [(f"{folder.name}/{path}", read) for path, read in _folder_files(folder)]
    return _Source(pin.name, distribution.version, pin.licence, stated, None, None, files)


def _folder_files(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for path in sorted(folder.rglob("*.py")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes


def _stated_licence(metadata: "Message[Any, Any]") -> str:
    """Return the licence in a package's metadata: an expression, a short name, or classifiers."""
    name = str(metadata["License-Expression"] or metadata["License"] or "").strip()
    if name and "\n" not in name:
        return name
    classifiers = [str(value) for value in metadata.get_all("Classifier", []) if str(value).startswith("License ::")]
    return " AND ".join(value.rpartition("::")[2].strip() for value in classifiers) or "nothing"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _find_wheel(wheels: Path, pin: Pin) -> Path | None:
    """Return the first wheel of a package at its version; its Python files are nearly the same on every platform."""
    start = (_normal(pin.name), pin.version)
    fitting = (path for path in sorted(wheels.glob("*.whl")) if _name_and_version(path) == start)
    return next(fitting, None)


def _name_and_version(wheel: Path) -> tuple[str, str]:
    name, _, rest = wheel.name.partition("-")
    return _normal(name), rest.partition("-")[0]


def _download(pin: Pin, wheels: Path) -> None:
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(wheels.absolute()), f"{pin.name}=={pin.version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=OUTSIDE)  # noqa: S603  our own interpreter
    if result.returncode or _find_wheel(wheels, pin) is None:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        msg = f"pip did not download {pin.name}=={pin.version}: {reason}; fix that, or put the wheel into {wheels}"
        raise FimserverError(msg)


def _write_documents(path: Path, documents: Iterable[Document]) -> None:
    with _replacing(path) as unfinished, lzma.open(unfinished, "wb", preset=_PRESET) as file:
        for document in sorted(documents, key=lambda document: (document.package, document.path)):
            file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False).encode() + b"\n")


def _read_file(path: Path) -> list[Document]:
    try:
        with lzma.open(path, "rb") as file:
            return [Document(**json.loads(line)) for line in file]
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, lzma.LZMAError, EOFError, ValueError, TypeError) as error:
        raise _broken(path, error) from error


def _check_counts(path: Path, documents: Iterable[Document], expected: dict[str, int]) -> None:
    counts = Counter(document.package for document in documents)
    for name in counts | expected:
        if counts[name] != expected.get(name, 0):
            msg = (
                f"{path} has {counts[name]} files of {name}, but {MANIFEST_FILE} says {expected.get(name, 0)}; {_AGAIN}"
            )
            raise FimserverError(msg)


def _missing(path: Path) -> FimserverError:
    return FimserverError(f"{path} does not exist; {_AGAIN}")


def _broken(path: Path, error: Exception) -> FimserverError:
    return FimserverError(f"{path} is broken ({type(error).__name__}: {error}); {_AGAIN}")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the written file replaces ``path`` when it is complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
