"""Known models: recognized by their configs, licences, and the table of docs/reference/models.md."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command import run

import fimserver
from fimserver.checkpoints import known
from fimserver.checkpoints.catalog import list_needs, to_gpu_markdown, to_markdown
from fimserver.checkpoints.known import KNOWN_MODELS, find_known_fact, find_known_metadata, is_permissive, read_known

DOCS = Path(fimserver.__file__).parent / "docs"
NAMES = sorted(folder.name for folder, _ in read_known())


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((KNOWN_MODELS / name / "config.json").read_text())
    return config


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata in every known model's folder."""
    for name in NAMES:
        shutil.copytree(KNOWN_MODELS / name, tmp_path / name)
        (tmp_path / name / "fimserver.json").touch()
    monkeypatch.setattr(known, "KNOWN_MODELS", tmp_path)


def found(config: dict[str, Any]) -> str | None:
    path = find_known_metadata(config)
    return None if path is None else path.parent.name


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("name", NAMES)
def test_a_config_finds_its_own_metadata(name: str) -> None:
    assert found(config_of(name)) == name


@pytest.mark.usefixtures("served")
def test_models_of_equal_sizes_are_told_apart() -> None:
    dream = config_of("dream-coder-7b")
    assert found({**dream, "mask_token_id": 5}) is None
    assert found({**dream, "expand_token_id": 151667}) == "dreamon-v0-7b"
    assert found({**dream, "model_type": "qwen2"}) is None
    published = config_of("open-dcoder-0.5b")
    del published["mask_token_id"]
    assert found(published) == "open-dcoder-0.5b"
    del published["auto_map"]
    assert found(published) == "qwen2.5-coder-0.5b"
    assert found({**published, "hidden_size": 64}) is None
    assert found({**published, "model_type": ["qwen2"]}) is None


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name: str) -> None:
    for fact in json.loads((KNOWN_MODELS / name / "facts.json").read_text())["checkpoints"]:
        assert set(fact) == {"name", "formats", "file_bytes", "licence", "use", "provenance"}
        assert fact["use"].endswith(".")


@pytest.mark.parametrize(
    ("licence", "is_good"),
    [
        ("Apache-2.0", True),
        ("apache-2.0", True),
        ("MIT", True),
        ("bsd-3-clause", True),
        ("ISC", True),
        ("apache-2.0, https://example.org/LICENSE", True),
        ("other, qwen-research, https://example.org/LICENSE", False),
        ("Qwen Research License", False),
        ("apple-amlr", False),
        ("gemma", False),
        ("cc-by-nc-4.0", False),
        ("mit, other", False),
        ("not named; read its page", False),
        ("https://example.org/mit", False),
        ("", False),
    ],
)
def test_permissive_licences(licence: str, is_good: bool) -> None:
    assert is_permissive(licence) is is_good


def test_facts_are_found_by_name() -> None:
    fact = find_known_fact("qwen/qwen2.5-coder-3b")
    assert fact is not None
    assert not is_permissive(fact["licence"])
    assert find_known_fact("no/such") is None


def test_the_documented_tables_are_up_to_date() -> None:
    """Write them again with: python -m fimserver.checkpoints.catalog."""
    assert to_markdown() in (DOCS / "reference" / "models.md").read_text(encoding="utf-8")
    assert to_gpu_markdown() in (DOCS / "reference" / "gpu.md").read_text(encoding="utf-8")


def test_the_list_shows_licence_memory_and_use() -> None:
    result = run("model", "list")
    assert result.returncode == 0, result.stderr
    assert "Qwen Research License; 8.0 GB of memory on a GPU, 10.9 GB on a CPU" in result.stdout
    assert "not for commercial use" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "shipped" not in line) <= 120
    listed = {one["name"]: one for one in json.loads(run("model", "list", "--json").stdout)["models"]}
    for need in list_needs():
        row = listed[need.name]
        assert (row["licence"], row["use"]) == (need.licence, need.use)
        assert (row["gpu_bytes"], row["cpu_bytes"]) == (need.gpu_bytes, need.cpu_bytes)
    assert listed["tiny"]["licence"] is None
    assert listed["tiny"]["gpu_bytes"] is None
