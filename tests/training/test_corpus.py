"""The corpus: what goes in, what is left out, what is refused; and the tokenizer that is learned from it."""

import dataclasses
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fimserver.errors import FimserverError
from fimserver.training.corpus import (
    DOCUMENTS_FILE,
    HELD_OUT_FILE,
    HELD_OUT_MODULES,
    HELD_OUT_PACKAGES,
    MANIFEST_FILE,
    PINS,
    Document,
    Manifest,
    Pin,
    build_corpus,
    clean_text,
    find_missing,
    is_held_out,
    read_documents,
    read_held_out,
    read_manifest,
)
from fimserver.training.tokenizer import SPECIAL_TOKENS, train_tokenizer

SMALL = Pin("small-package", "1.0", "MIT")
STATED = Pin("stated", "2.0", "BSD-3-Clause", stated="BSD License")
WEAK = Pin("weak", "1.0", "MPL-2.0")
FLASK = Pin("flask", "3.0", "BSD-3-Clause")
TABLE = (SMALL, STATED, WEAK, FLASK)


def code(name: str, functions: int = 12) -> str:
    """Python that is long enough to be kept, and no other's copy."""
    return "\n".join(f"def {name}_{i}(value):\n    return value + {i}\n\n" for i in range(functions))


def write_wheel(folder: Path, pin: Pin, files: dict[str, str | bytes], licence: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = pin.name.replace("-", "_")
    path = folder / f"{name}-{pin.version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.4\nName: {pin.name}\nVersion: {pin.version}\n"
    metadata += licence or (
        f"Classifier: License :: OSI Approved :: {pin.stated}\n"
        if pin.stated
        else f"License-Expression: {pin.licence}\n"
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for place, text in files.items():
            wheel.writestr(place, text)
        wheel.writestr(f"{name}-{pin.version}.dist-info/METADATA", metadata)
    return path


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Manifest]:
    """Build a corpus of tiny wheels and a tiny library; files may be added to the small package and to the library."""

    def make(
        folder: str = "corpus",
        small: dict[str, str | bytes] | None = None,
        library: dict[str, str] | None = None,
    ) -> Manifest:
        wheels, standard = tmp_path / "wheels", tmp_path / "library"
        write_wheel(wheels, SMALL, {"small/a.py": code("a"), "small/data.txt": code("data"), **(small or {})})
        write_wheel(wheels, STATED, {f"stated/{name}.py": code(name) for name in ("b", "c", "d", "e", "f", "g")})
        write_wheel(wheels, WEAK, {"weak/w.py": code("w")})
        write_wheel(wheels, FLASK, {"flask/app.py": code("app"), "flask/cli.py": code("cli")})
        modules = {"queue.py": code("queue"), "csv.py": code("csv"), "zipfile/__init__.py": code("zip")}
        modules |= {"zipfile/_path/glob.py": code("glob"), "site-packages/other.py": code("other")}
        for place, text in (modules | (library or {})).items():
            (standard / place).parent.mkdir(parents=True, exist_ok=True)
            (standard / place).write_text(text, encoding="utf-8")
        return build_corpus(tmp_path / folder, wheels, pins=TABLE, installed=(), library=standard)

    return make


def places(documents: list[Document]) -> set[str]:
    return {f"{document.package}:{document.path}" for document in documents}


def test_held_out_files_are_kept_apart(build: Callable[..., Manifest], tmp_path: Path) -> None:
    build()
    training, held_out = read_documents(tmp_path / "corpus"), read_held_out(tmp_path / "corpus")
    assert places(training) == {
        "small-package:small/a.py",
        "weak:weak/w.py",
        "python:queue.py",
        *(f"stated:stated/{name}.py" for name in "bcdefg"),
    }
    assert places(held_out) == {
        "flask:flask/app.py",
        "flask:flask/cli.py",
        "python:csv.py",
        "python:zipfile/__init__.py",
        "python:zipfile/_path/glob.py",
    }
    assert next(document.text for document in training if document.package == "weak") == code("w")
    assert not list((tmp_path / "corpus").glob("*.part"))


def test_copies_of_held_out_files_are_dropped(build: Callable[..., Manifest], tmp_path: Path) -> None:
    copies: dict[str, str | bytes] = {
        "small/_compat.py": code("app"),  # the text of flask/app.py
        "small/my_csv.py": code("csv").replace("\n", "\r\n"),  # csv.py, with other line ends
        "small/_vendor/werkzeug/routing.py": code("routing"),
        "small/click.py": code("own"),  # not a copy: only its name is the same
        "small/csv.py": code("own_csv"),
        "small/again.py": code("a"),
        "small/zipfile/x.py": code("zipx"),  # not the library's
    }
    library = {"argparse_copy.py": code("csv")}
    build(small=copies, library=library)
    small = {d.path for d in read_documents(tmp_path / "corpus") if d.package == "small-package"}
    assert small == {"small/a.py", "small/click.py", "small/csv.py", "small/zipfile/x.py"}
    assert "python:argparse_copy.py" not in places(read_documents(tmp_path / "corpus"))
    assert "python:csv.py" in places(read_held_out(tmp_path / "corpus"))
    assert "routing" not in "".join(d.text for d in read_held_out(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (code("x").encode(), True),
        (b"\xef\xbb\xbf" + code("x").encode(), True),
        (b"x = 1\n" * 66, False),  # 396 bytes
        (b"x = 1\n" * 67, True),
        (b"x = 1\n" * 50_000, True),
        (b"x = 1\n" * 50_001, False),
        (code("x").encode() + b"#" * 1000, True),
        (code("x").encode() + b"#" * 1001, False),
        (b"# Generated by a tool. DO NOT EDIT.\n" + code("x").encode(), False),
        (b"# Generated by a tool.\n" + code("x").encode(), True),
        (code("x").encode() + b"print 'two'\n", False),
        (code("x").encode() + b"\0", False),
        (code("x").encode() + b"# \xff\n", False),
        (code("x").encode() + b"s = '\\d'\n", True),  # a warning, which is no error
    ],
)
def test_cleaning(raw: bytes, kept: bool) -> None:
    assert (clean_text(raw) is not None) == kept


def test_line_ends_are_plain() -> None:
    assert clean_text(b"\xef\xbb\xbf" + code("x").replace("\n", "\r\n").encode()) == code("x")
    assert clean_text(code("x").replace("\n", "\r").encode()) == code("x")


def test_building_twice_gives_the_same(build: Callable[..., Manifest], tmp_path: Path) -> None:
    assert build("one") == build("two")
    for name in (MANIFEST_FILE, DOCUMENTS_FILE, HELD_OUT_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    first, second = read_documents(tmp_path / "one"), read_documents(tmp_path / "two")
    assert first == second
    assert first != sorted(first, key=lambda document: (document.package, document.path))  # shuffled


def test_the_manifest_lists_the_content(build: Callable[..., Manifest], tmp_path: Path) -> None:
    built = build()
    manifest = read_manifest(tmp_path / "corpus")
    assert manifest == built
    assert manifest.held_out_packages == HELD_OUT_PACKAGES
    assert manifest.held_out_modules == HELD_OUT_MODULES
    packages = {package.name: package for package in manifest.packages}
    assert {name: package.licence for name, package in packages.items()} == {
        "small-package": "MIT",
        "stated": "BSD-3-Clause",
        "weak": "MPL-2.0",
        "flask": "BSD-3-Clause",
        "python": "PSF-2.0",
    }
    assert packages["stated"].licence_stated == "BSD License"
    assert [name for name, package in packages.items() if package.weak_copyleft] == ["weak"]
    assert (packages["stated"].files, packages["stated"].held_out_files) == (6, 0)
    assert (packages["flask"].files, packages["flask"].held_out_files) == (0, 2)
    assert packages["weak"].characters == len(code("w"))
    assert packages["small-package"].wheel == "small_package-1.0-py3-none-any.whl"
    assert len(packages["small-package"].sha256 or "") == 64
    document = next(d for d in read_documents(tmp_path / "corpus") if d.package == "weak")
    assert manifest.licence_of(document) == "MPL-2.0"


@pytest.mark.parametrize(
    ("package", "path"),
    [
        ("flask", "flask/app.py"),
        ("python", "csv.py"),
        ("python", "zipfile/_path/glob.py"),
        ("python", "test/test_csv.py"),
        ("python", "test/test_zipfile64.py"),
        ("python", "test/test_zipfile/test_core.py"),
        ("weak", "weak/_vendor/click/core.py"),
    ],
)
def test_held_out_files_are_refused(build: Callable[..., Manifest], tmp_path: Path, package: str, path: str) -> None:
    build()
    folder = tmp_path / "corpus"
    documents = [*read_documents(folder), Document(package, path, "x = 1\n")]
    with lzma.open(folder / DOCUMENTS_FILE, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(document)) + "\n" for document in documents)
    with pytest.raises(FimserverError, match=f"holds {path} of {package}, which is held out; run: fimserver corpus"):
        read_documents(folder)


def spoil_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def spoil_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def lose_a_line(path: Path) -> None:
    lines = lzma.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(lzma.compress(b"".join(lines[1:])))


def no_objects(path: Path) -> None:
    path.write_bytes(lzma.compress(b"[1]\n"))


@pytest.mark.parametrize("spoil", [spoil_end, spoil_middle, lose_a_line, no_objects, Path.unlink])
@pytest.mark.parametrize(("name", "read"), [(DOCUMENTS_FILE, read_documents), (HELD_OUT_FILE, read_held_out)])
def test_a_broken_file_is_an_error_with_a_remedy(
    build: Callable[..., Manifest],
    tmp_path: Path,
    name: str,
    read: Callable[[Path], list[Document]],
    spoil: Callable[[Path], None],
) -> None:
    build()
    spoil(tmp_path / "corpus" / name)
    with pytest.raises(FimserverError, match=rf"{name} .*run: fimserver corpus"):
        read(tmp_path / "corpus")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 2}'])
def test_a_broken_manifest_is_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(FimserverError, match=rf"{MANIFEST_FILE} is .*run: fimserver corpus"):
        read_manifest(tmp_path)


def test_an_unexpected_wheel_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "queue.py").write_text(code("queue"), encoding="utf-8")

    def build(pin: Pin) -> None:
        build_corpus(tmp_path / "corpus", tmp_path, pins=(pin,), installed=(), library=library)

    path = write_wheel(tmp_path, SMALL, {"small/a.py": code("a")}, licence="License: GPL-3.0\n")
    with pytest.raises(FimserverError, match=r"states the licence 'GPL-3\.0', and 'MIT' was expected"):
        build(SMALL)
    path.rename(tmp_path / "small_package-1.1-py3-none-any.whl")
    with pytest.raises(FimserverError, match=r"is small_package 1\.0, not small-package 1\.1"):
        build(dataclasses.replace(SMALL, version="1.1"))
    spoil_middle(write_wheel(tmp_path, SMALL, {"small/a.py": code("a", 400)}))
    with pytest.raises(FimserverError, match="is not a complete wheel"):
        build(SMALL)
    assert not (tmp_path / "corpus").exists()


def test_a_failure_of_pip_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FimserverError, match=r"pip did not download small-package==1\.0: ERROR: No matching"):
        build_corpus(tmp_path / "corpus", pins=(SMALL,), installed=())


def test_missing_wheels(tmp_path: Path) -> None:
    assert find_missing(tmp_path) == list(PINS)
    write_wheel(tmp_path, dataclasses.replace(FLASK, version="0.1"), {})
    assert find_missing(tmp_path, TABLE) == list(TABLE)  # another version is not it
    write_wheel(tmp_path, SMALL, {})
    assert find_missing(tmp_path, TABLE) == [STATED, WEAK, FLASK]


def test_nothing_is_fetched_unasked(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", "corpus", "--folder", str(tmp_path / "corpus")]
    result = subprocess.run(command, input="n\n", capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"pip will download {len(PINS)} wheels from PyPI, about 189 MB, into {tmp_path}" in result.stderr
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_importing_is_light() -> None:
    heavy = ["torch", "tokenizers", "pygls", "tree_sitter", "platformdirs", "rich", "click"]
    script = f"import sys, fimserver.training.corpus; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tokenizer() -> None:
    documents = [Document("p", f"{i}.py", code(f"name{i}")) for i in range(20)]
    tokenizer = train_tokenizer(documents, 400)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert "Ċ" + 4 * "Ġ" in tokenizer.encode("def f():\n    return 12").tokens  # a newline with its indentation
    assert tokenizer.encode("12").tokens == ["1", "2"]
    text = "def f(x):\n\tif x:\r\n        return '→ é 🙂'  # 2024\n\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.to_str() == train_tokenizer(documents, 400).to_str()
    assert tokenizer.get_vocab_size() <= 400


def test_tests_of_other_modules_are_trained_on() -> None:
    assert not is_held_out("python", "test/test_queue.py")
    assert not is_held_out("python", "test/__init__.py")
    assert not is_held_out("other", "test/test_csv.py")
