"""Documents that can fail: links lead somewhere, commands and settings exist, paths are none of ours."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fimserver import INSTALLED_FROM
from fimserver.context.languages.table import LANGUAGES
from fimserver.errors import install_command
from fimserver.lsp.configuration import RESTART_COMMAND
from fimserver.lsp.convert import ACCEPT_COMMAND
from fimserver.lsp.features import EXPLAIN_COMMAND, SNOOZE_COMMAND
from fimserver.settings import BY_WIRE_NAME

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "fimserver" / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "fimserver").rglob("*.md")),
    *sorted(ROOT.glob("editors/*/*.md")),
]
# The kinds of documents, and how the first paragraph of each page begins.
KINDS = {"tutorial": "Learn ", "how-to": "How to ", "reference": "", "explanation": ""}
KIND_PAGES = [page for kind in KINDS for page in sorted((DOCS / kind).glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_have_targets(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


def anchors_of(page: Path) -> set[str]:
    """Return the names of a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index_under_its_kind() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.*)\]\((\S+)\): .{20,}\.$", index, re.MULTILINE)
    assert {name for _, name in listed} == {page.relative_to(DOCS).as_posix() for page in KIND_PAGES}
    for title, name in listed:
        assert (DOCS / name).read_text(encoding="utf-8").startswith(f"# {title}\n"), title
    sections = {section.split(":")[0].lower(): section for section in index.split("\n## ")[1:]}
    assert list(sections) == list(KINDS)
    for kind, section in sections.items():
        assert {name.split("/")[0] for name in re.findall(r"^- \[.*\]\((\S+)\)", section, re.MULTILINE)} == {kind}


def test_no_page_is_outside_of_the_kinds() -> None:
    assert {page for page in DOCS.rglob("*.md") if page != DOCS / "README.md"} == set(KIND_PAGES)


@pytest.mark.parametrize("page", KIND_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_first_paragraph_says_what_the_page_is_for(page: Path) -> None:
    title, paragraph = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert paragraph.startswith(KINDS[page.parent.name])
    assert re.match(r"[A-Z]", paragraph)
    assert 40 <= len(paragraph) <= 500, "as short as the next line of a list of pages"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_in_documents_exist(page: Path) -> None:
    commands = {
        c.removeprefix("fimserver.") for c in (ACCEPT_COMMAND, EXPLAIN_COMMAND, RESTART_COMMAND, SNOOZE_COMMAND)
    }
    manifest = (ROOT / "editors" / "vscode" / "package.json").read_text(encoding="utf-8")
    of_vscode = re.findall(r'"fimserver\.(\w+)": \{', manifest) if "vscode" in page.parts else []
    known = {*BY_WIRE_NAME, *commands, "json", *of_vscode}
    assert set(re.findall(r"`fimserver\.([a-z][A-Za-z]+)`", page.read_text(encoding="utf-8"))) <= known


def test_files_in_the_architecture_exist() -> None:
    text = (ROOT / "fimserver" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`([a-z_/]+\.py)", text))
    assert len(files) > 10
    known = {p.name for p in (ROOT / "fimserver").rglob("*.py")}
    for file in files:
        exists = (ROOT / file).exists() or (ROOT / "fimserver" / file).exists() or file in known
        assert exists, file


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_number_of_languages_is_right(name: str) -> None:
    text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    assert re.findall(r"syntax of (\d+) languages", text) == [str(len(LANGUAGES))]


def test_every_test_of_a_security_promise_exists() -> None:
    text = (ROOT / "fimserver" / "docs" / "reference" / "security.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:tests|editors)/[\w/.]+)`", text))
    assert len(files) >= 15
    for file in files:
        assert (ROOT / file).exists(), file


def test_files_for_contributors_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:fimserver|tests|editors)/[\w/.]+)`", text))
    assert len(files) > 20
    for file in files:
        assert (ROOT / file).exists(), file


def test_functions_in_the_architecture_exist() -> None:
    text = (ROOT / "fimserver" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "fimserver").rglob("*.py"))
    named = re.findall(r"\.py: ([A-Za-z_.]+)`", text)
    assert len(named) > 8
    for name in named:
        last = name.rsplit(".", 1)[-1]
        assert re.search(rf"(def|class) {last}\b", source), name


def test_commands_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in set(re.findall(r"fimserver (lsp|complete|eval \w+|doctor)\b", text)):
        command = [sys.executable, "-P", "-m", "fimserver.cli.main", *line.split(), "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0, line


def test_nothing_installs_a_name_that_is_not_ours() -> None:
    """Anyone could register the name on a package index and run code on the machines of those who install it."""
    endings = {".md", ".py", ".ts", ".lua", ".json", ".toml", ".yaml", ".txt", ".mjs"}
    folders = [ROOT / "fimserver", ROOT / "editors", ROOT / ".ci"]
    files = [*ROOT.glob("*.*"), *(file for folder in folders for file in folder.rglob("*"))]
    for file in files:
        if file.suffix in endings and "node_modules" not in file.parts and file.is_file():
            text = file.read_text(encoding="utf-8")
            assert not re.search(r"(?:pipx?|uv|uvx)(?: \w+)* (?:install|run|add) +['\"]?fimserver\b", text), file
    page = " ".join(path.read_text(encoding="utf-8") for path in PAGES)
    installed = re.findall(r"pip install (?:-e )?['\"]?(\.|[\w/.-]+)\[[\w,]+\]", page)
    assert {INSTALLED_FROM} == set(installed)


def test_a_missing_package_has_a_command_with_the_version_that_is_needed() -> None:
    assert "pip install" in install_command("torch", "tree_sitter_c")
    assert '"torch>=' in install_command("torch")
    assert '"tree-sitter-c<' in install_command("tree_sitter_c")
    assert '"xllamacpp>=' in install_command(extra="llamacpp")
    assert "unknown" not in install_command("unknown"), "a module's name can be that of a stranger's package"
    assert f"pip install {INSTALLED_FROM} " in install_command("unknown")


def test_the_gate_runs_the_readmes_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Test it", 1)[1]
    command = next(line for line in section.splitlines() if line.startswith("python3 -m venv"))
    assert "-m tests" in command
    assert "## Test it" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
