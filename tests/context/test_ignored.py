"""Ignore files: the same patterns as git, in a time that no file decides, and each file's faults its own."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from support.rights import as_another_user

from fimserver.context.privacy.file_checks import FileChecks
from fimserver.context.privacy.ignored import IgnoreRules
from fimserver.context.privacy.patterns import IgnorePatterns, TooCostlyError, Work

NAMES = ["a", "b", "ab", "ba", "abb", "a.b", "a b", "[a]", "x/a", "x/ab", "x/y/a", "x/y/ab", "a/b", "a/b/a", "b/x/y/ba",
    "a/c/b", "ab/b", "a/c/d/b", "x/a/c/b", "\u00e9", "\u00e9x"]  # fmt: skip
PIECES = ["a", "b", "x", "y", "*", "**", "?", "/", "[ab]", "[!a]", "[^b]", "[a-y]", "[[:alpha:]]", "\\", ".", "ab", " "]


def says(lines: str, name: str) -> bool:
    """Return whether a file's patterns ignore a name, or a folder above it."""
    patterns, parts = IgnorePatterns.parse(lines), name.split("/")
    for end in range(1, len(parts) + 1):
        if patterns.decide(parts[:end], is_folder=end < len(parts), work=Work()):
            return True
    return False


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def asked_of_git(repository: Path, lines: str) -> list[bool]:
    (repository / ".gitignore").write_text(lines)
    command = ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "--stdin", "-z", "-v", "-n"]
    given = "\0".join(NAMES).encode()
    result = subprocess.run(command, cwd=repository, input=given, capture_output=True, check=False)
    fields = result.stdout.decode().split("\0")
    patterns = [fields[i + 2] for i in range(0, len(fields) - 3, 4)]
    assert len(patterns) == len(NAMES)
    return [bool(pattern) and not pattern.startswith("!") for pattern in patterns]


@pytest.mark.parametrize("seed", range(8))
def test_patterns_say_what_git_says(repository: Path, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(40):
        lines = "".join(
            chance.choice(["", "", "", "!"]) + "".join(chance.choices(PIECES, k=chance.randint(1, 6))) + "\n"
            for _ in range(chance.randint(1, 4))
        )
        assert [says(lines, name) for name in NAMES] == asked_of_git(repository, lines), repr(lines)


@pytest.mark.parametrize(
    "lines",
    [
        "a/**/b\n", "**/a/b\n", "a/**\n", "/a\n", "x/\n!x/a\n", "*\n!a\n!x\n", "a\\ b\n", "a b  \n", "\\!a\n", "#a\n",
        "\\[a\\]\n", "[\n", "a[\n", "[]a]\n", "[!]a]\n", "[a-\n", "/\n", "//\n", "**\n", "**/\n", "***\n", "a**b\n",
        "\\\n", "a\\\n", "[[:digit:]]\n", "[[:none:]]\n", "[b-a]\n", "a\r\n", "\ufeffa\n", "?\n", "x/*\n", "x/**/a\n",
        "a**/b\n", "***/a\n", "a\\/b\n", "??\n", "x/a**/b\n", "[!a]\n", "\u00e9\n", "[\u00e0-\u00fc]x\n", "x**/*/a\n",
    ],
)  # fmt: skip
def test_unusual_patterns_say_what_git_says(repository: Path, lines: str) -> None:
    rules = IgnoreRules()
    expected = asked_of_git(repository, lines)
    found = [rules.refuse((repository / name).as_uri()) is not None for name in NAMES]
    assert found == expected


@pytest.mark.parametrize(
    "lines",
    [
        "*a*b*/*a*b*/*a*b*/*a*b*/q\n",
        "*a*a*ab\n" * 20,
        "?a?a?a?a?*[a-b]*[!c]*c\n" * 4_000,
        "**/a/**/a/**/a/**/a/**/b\n" * 200,
        "*a" * 2_000,
        "[" + "a-b" * 30_000 + "]*\n",
        "\n".join(f"name{i}" for i in range(200_000)),
        "\n".join(f"*{i}" for i in range(60_000)),
    ],
)
@pytest.mark.parametrize("name", ["a" * 250, "/".join(["a" * 15] * 200), "/".join(["ab" * 100] * 15)])
def test_no_pattern_takes_long(tmp_path: Path, lines: str, name: str) -> None:
    """Such files froze the daemon for 40 s and more, and the next one too."""
    (tmp_path / ".fimserverignore").write_text(lines)
    rules = IgnoreRules()
    begin = time.process_time()
    for _ in range(2):
        rules.refuse(f"{tmp_path.as_uri()}/{name}")
    assert time.process_time() - begin < 1.0


def test_a_file_that_cannot_be_applied_refuses_what_is_below(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    (tmp_path / "large").mkdir()
    (tmp_path / "large/.fimserverignore").write_text("x" * 300_000)
    rules = IgnoreRules()
    refused = rules.refuse((tmp_path / "large/a.py").as_uri())
    assert refused is not None
    assert "too large" in refused.detail
    assert rules.refuse((tmp_path / "clean/a.py").as_uri()) is None
    (tmp_path / "large/.fimserverignore").write_text("b.py\n")
    assert rules.refuse((tmp_path / "large/a.py").as_uri()) is None
    with pytest.raises(TooCostlyError):
        IgnorePatterns.parse("*a\n" * 6_000)


def test_long_and_odd_paths_are_one_file_s_matter(tmp_path: Path) -> None:
    checks = FileChecks()
    begin = time.process_time()
    for uri in (f"file:///{'a/' * 500_000}b.py", f"file:///{'a' * 5_000}.py"):
        refusal = checks.check(uri, with_git=True).refusal
        assert refusal is not None
        assert refusal.reason == "long_path"
    assert checks.check(f"{tmp_path.as_uri()}/{'n' * 300}.py", with_git=True).refusal is None
    assert checks.check((tmp_path / "a.py").as_uri(), with_git=True).refusal is None
    assert time.process_time() - begin < 5.0


def test_an_unsearchable_folder_is_no_fault(tmp_path: Path) -> None:
    """``Path.exists`` raises there in Python 3.11, which ended completions in every document of the language."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "a.py").write_text("x = 1\n")
    closed.chmod(0)
    try:
        with as_another_user():
            with pytest.raises(PermissionError):
                (closed / "a.py").stat()
            facts = FileChecks(within_s=60).check((closed / "a.py").as_uri(), with_git=True)
    finally:
        closed.chmod(0o700)
    assert facts.refusal is None


class _Stalled(IgnoreRules):
    """A file system that does not answer for names that contain ``stalled``."""

    def refuse(self, uri: str, *, with_git: bool = True) -> None:
        if "stalled" in uri:
            time.sleep(self.seconds)
        if "broken" in uri:
            raise OSError(107, "Transport endpoint is not connected")

    seconds = 3.0


def test_a_file_system_that_does_not_answer_costs_one_document(tmp_path: Path) -> None:
    checks = FileChecks(_Stalled())
    uris = [f"file:///mnt/stalled/{i}.py" for i in range(4)]
    begin = time.monotonic()
    for uri in uris:
        assert checks.check(uri, with_git=True).refusal is not None
    waited = time.monotonic() - begin
    assert 0.4 <= waited < 3.0
    begin = time.monotonic()
    for uri in uris * 50:
        refusal = checks.check(uri, with_git=True).refusal
        assert refusal is not None
        assert refusal.reason == "file_slow"
    assert time.monotonic() - begin < 1.0  # nothing is waited for again
    assert checks.check((tmp_path / "a.py").as_uri(), with_git=True).refusal is None


def test_an_answer_that_comes_late_counts() -> None:
    rules = _Stalled()
    rules.seconds = 1.5
    checks = FileChecks(rules)
    uri = "file:///mnt/stalled/a.py"
    assert checks.check(uri, with_git=True).refusal is not None
    rules.seconds = 0.0
    deadline = time.monotonic() + 30
    while checks.check(uri, with_git=True).refusal is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_slow_file_system_is_served_by_its_last_answer() -> None:
    """An answer that comes late is not thrown away: each check takes longer than is waited for."""
    rules = _Stalled()
    rules.seconds = 0.3
    checks = FileChecks(rules, within_s=0.05)
    uri = "file:///mnt/stalled/a.py"
    assert checks.check(uri, with_git=True).refusal is not None
    time.sleep(0.6)
    for _ in range(5):
        assert checks.check(uri, with_git=True).refusal is None
        time.sleep(0.1)


def test_many_files_that_do_not_answer_leave_the_others_alone(tmp_path: Path) -> None:
    checks = FileChecks(_Stalled(), within_s=0.01)
    for i in range(100):
        assert checks.check(f"file:///mnt/stalled/{i}.py", with_git=True).refusal is not None
    time.sleep(_Stalled.seconds + 0.5)
    assert checks.check((tmp_path / "a.py").as_uri(), with_git=True).refusal is None


def test_an_error_is_one_document_s() -> None:
    checks = FileChecks(_Stalled())
    refusal = checks.check("file:///mnt/broken/a.py", with_git=True).refusal
    assert refusal is not None
    assert (refusal.reason, "OSError" in refusal.detail) == ("file_error", True)
    assert checks.check("file:///a.py", with_git=True).refusal is None


def test_only_the_own_file_system_is_asked() -> None:
    for uri in ("untitled:a.py", "vscode-remote://ssh/a.py", "file://other/share/a.py", "git:/a.py?x", "file:a.py"):
        assert FileChecks().check(uri, with_git=True).refusal is None
