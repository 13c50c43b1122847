"""What a release publishes is complete: the wheel and the source archive are built and checked as .ci/release does."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fimserver

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = (
    "fimserver/models/tiny/model.safetensors",
    "fimserver/docs/reference/settings.md",
    "fimserver/samples/inventory.py",
)


def test_versions_agree() -> None:
    manifest = json.loads((ROOT / "editors" / "vscode" / "package.json").read_text(encoding="utf-8"))
    assert PROJECT["version"] == fimserver.__version__ == manifest["version"]
    text = (ROOT / "editors" / "vscode" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"fimserver-([\d.]+)\.vsix", text)) == {fimserver.__version__}


def python(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow("builds a wheel and a source archive")
def test_wheel_and_source_archive(tmp_path: Path) -> None:
    python("-m", "build", "--outdir", tmp_path, ".")
    (wheel,), (archive,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    assert python("-m", "twine", "check", "--strict", wheel, archive).count("PASSED") == 2
    python("-m", "check_wheel_contents", wheel)
    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
    assert set(NEEDED) <= names
    assert not [name for name in names if name.startswith(("tests/", "editors/", ".ci/"))]
    assert len([name for name in names if name.endswith(".py")]) == len(list((ROOT / "fimserver").rglob("*.py")))
    with tarfile.open(archive) as packed:
        stems = {name.split("/", 1)[-1] for name in packed.getnames()}
    assert {*NEEDED, "README.md", "LICENSE", "pyproject.toml"} <= stems


def test_the_script_uploads_nothing() -> None:
    commands = (ROOT / ".ci" / "release").read_text(encoding="utf-8").split("<<NEXT")[0]
    assert not re.search(r"^[^#\n]*(?:twine upload|vsce publish)", commands, re.MULTILINE)
