"""Models added by name, from a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.command import run
from support.hub_server import Hub, Repository

import fimserver
from fimserver.checkpoints import hub as hub_module
from fimserver.checkpoints.hub import add_model as add_checked_model
from fimserver.checkpoints.hub import find_offer
from fimserver.checkpoints.installed import find_added, find_model, find_removal, list_models, read_record, record_file
from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.engine.loading.weights import check_weights, read_config
from fimserver.engine.remote.servers.vllm import find_own
from fimserver.errors import WeightsError

TINY = SHIPPED_MODELS / "tiny"
add_model = partial(add_checked_model, check_config=read_config, check_weights=check_weights)
NAME = "some/model"
SAMPLE = Path(fimserver.__file__).parent / "samples" / "inventory.py"


def fetched_weights(hub: Hub) -> list[str]:
    return [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_canvases_of_a_teams_server_need_no_weights_here(hub: Hub) -> None:
    """With config and tokenizer alone in the cache, prompts for a server are fimserver's own ids."""
    from huggingface_hub import snapshot_download

    assert find_own(NAME) is None
    snapshot_download(NAME, allow_patterns=["config.json", "tokenizer.json", "fimserver.json"])
    own = find_own(NAME)
    assert own is not None
    assert own.canvas_length == 16
    assert own.vocabulary.encode("def")
    assert fetched_weights(hub) == []


@pytest.mark.slow("starts commands and downloads a model from a local hub")
def test_adding_listing_completing_and_removing(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository(Path(shutil.copytree(TINY, tmp_path / "tiny")), licence="gemma")
    added = run("model", "add", NAME, "--yes")
    assert added.returncode == 0, added.stderr
    assert added.stdout.startswith(f"added {NAME}, {tmp_path / 'hf'}")
    for shown in ("gemma", "MB", str(tmp_path / "hf"), hub.repositories[NAME].commit[:12], "2026-06-01"):
        assert shown in added.stderr
    agents = [headers["user-agent"] for _, _, headers in hub.journal]
    assert agents
    assert not [a for a in agents if "torch" in a or "agent/" in a]
    assert not [path for _, path, _ in hub.journal if not path.startswith(("/api/models/some/", f"/{NAME}/resolve/"))]
    assert not [headers for _, _, headers in hub.journal if "authorization" in headers]

    hub.forget()
    hub.is_down = True
    completed = run("complete", f"{SAMPLE}:16:22", "--model", NAME, "--json")
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)["text"] == "pend(item)"
    listed = {one["name"]: one for one in json.loads(run("model", "list", "--json").stdout)["models"]}
    assert (listed["tiny"]["state"], listed[NAME]["state"]) == ("shipped", "added")
    assert listed[NAME]["num_bytes"] > 17_000_000
    removed = run("model", "remove", NAME, "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not Path(listed[NAME]["folder"]).exists()
    again = run("complete", f"{SAMPLE}:16:22", "--model", NAME)
    assert again.returncode == 1
    assert f"fimserver model add {NAME}" in again.stderr
    assert hub.journal == []


@pytest.mark.slow("starts commands and downloads a model from a local hub")
def test_a_model_with_tokens_for_the_middle_is_added_by_name(hub: Hub, tmp_path: Path) -> None:
    """It has no record of ours, a licence that is not permissive, and code of its own, which is never fetched."""
    from support.dense import write_fim_model

    folder = tmp_path / "fim"
    folder.mkdir()
    write_fim_model(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit\n")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    hub.repositories[NAME] = Repository(folder, licence="research-only")
    added = run("model", "add", NAME, "--yes")
    assert added.returncode == 0, added.stderr
    assert "not a permissive licence" in added.stderr
    assert not [name for name in hub.fetched() if name.endswith(".py")]
    completed = run("complete", f"{SAMPLE}:16:22", "--model", NAME, "--json")
    values = json.loads(completed.stdout)
    assert values["model"]["preferred_mode"] == "speculative"
    assert values["reason"] in {None, "syntax", "empty", "unsure"}, "random weights say anything"


def test_only_what_is_needed_is_fetched(hub: Hub, published: Path) -> None:
    offer = find_offer(NAME)
    assert hub.fetched() == []
    needed = {"README.md", "config.json", "fimserver.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in offer.files} == {*needed, "tokenizer.json"}
    assert offer.num_bytes == offer.missing_bytes == sum((published / f.name).stat().st_size for f in offer.files)
    added = add_model(offer)
    assert sorted(hub.fetched()) == sorted(f.name for f in offer.files)
    assert hub.fetched()[-1] == "model.safetensors"
    assert {p.name for p in Path(added.folder).iterdir()} == {*needed, "tokenizer.json"}
    assert find_offer(NAME).missing_bytes == 0
    assert find_model(NAME) == Path(added.folder)
    assert read_record() == {NAME: added}
    assert read_metadata(find_model(NAME)).name == "random"


def test_a_broken_download_resumes_in_the_next_run(hub: Hub, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, copy / file)
        where.update(dict.fromkeys(part, file))
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    hub.repositories[NAME] = Repository(copy)
    first, second = sorted(set(where.values()))
    sizes = {file: (copy / file).stat().st_size for file in (first, second)}
    drop = min(sizes.values()) - 5000
    offer = find_offer(NAME)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)

    def until_the_second(what: str, _done: int, _all: int) -> None:
        if what == second and hub.break_at is None and not hub.is_down:
            hub.break_at, hub.stays_down = drop, True

    with pytest.raises(WeightsError, match="resumes where it stopped"):
        add_model(offer, report=until_the_second)
    assert read_record() == {}
    assert find_added(NAME) is None
    kept = sizes[second] - find_offer_when_up(hub).missing_bytes
    assert 0 < kept <= drop

    hub.forget()
    steps: list[tuple[str, int, int]] = []
    added = add_model(find_offer(NAME), report=lambda *step: steps.append(step))
    assert hub.ranges() == {second: f"bytes={kept}-"}
    assert hub.fetched() == [second]
    assert (Path(added.folder) / second).read_bytes() == (copy / second).read_bytes()
    assert (second, sizes[first] + kept, sum(sizes.values())) in steps
    done = [d for what, d, _ in steps if what == second]
    assert done == sorted(done)
    assert done[-1] == sum(sizes.values())
    assert not list(Path(added.folder).parents[1].rglob("*.incomplete"))

    hub.forget()
    add_model(find_offer(NAME))
    assert hub.fetched() == []


def find_offer_when_up(hub: Hub) -> Any:
    hub.is_down = hub.stays_down = False
    return find_offer(NAME)


def test_a_connection_that_drops_once_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    offer = find_offer(NAME)
    hub.break_at = offer.files[[f.name for f in offer.files].index("model.safetensors")].num_bytes - 3000
    add_model(offer)
    assert fetched_weights(hub) == ["model.safetensors"] * 2
    assert "model.safetensors" in hub.ranges()


def test_damage_is_found_before_a_file_gets_its_name(hub: Hub) -> None:
    offer = find_offer(NAME)
    with pytest.raises(WeightsError, match=r"model\.safetensors was damaged"):
        add_model(offer, report=lambda *_step: setattr(hub, "damages", True))
    weights = next(f for f in offer.files if f.name == "model.safetensors")
    assert not (offer.folder / "blobs" / weights.blob).exists()
    assert find_offer(NAME).missing_bytes == weights.num_bytes
    hub.damages = False
    add_model(offer)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; it may be: diffusion_gemma, qwen2, Dream"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'; NVFP4, FP8 and bf16 checkpoints are supported"),
    ],
)
def test_a_wrong_config_is_refused_before_weights(hub: Hub, copy: Path, changes: dict[str, Any], words: str) -> None:
    change_config(copy, **changes)
    hub.repositories[NAME] = Repository(copy)
    with pytest.raises(WeightsError, match=words):
        add_model(find_offer(NAME))
    assert "config.json" in hub.fetched()
    assert fetched_weights(hub) == []
    assert read_record() == {}


def test_unknown_metadata_is_refused_before_weights(hub: Hub, copy: Path) -> None:
    (copy / "fimserver.json").unlink()
    hub.repositories[NAME] = Repository(copy)
    with pytest.raises(WeightsError, match=r"has no fimserver\.json"):
        add_model(find_offer(NAME))
    assert fetched_weights(hub) == []


def test_the_26b_is_known_without_metadata_of_its_own(hub: Hub, copy: Path) -> None:
    """Its config alone: the other weights next to it are refused by name."""
    (copy / "fimserver.json").unlink()
    shutil.copy(KNOWN_MODELS / "diffusiongemma-26b-a4b-it" / "config.json", copy)
    hub.repositories[NAME] = Repository(copy)
    offer = find_offer(NAME)
    with pytest.raises(WeightsError, match=r"tensor .* (is missing|has shape)"):
        add_model(offer)
    folder = offer.folder / "snapshots" / offer.commit
    assert read_metadata(folder).prompt_layout == "chat"
    assert read_record() == {}


def test_wrong_weights_are_named_at_once(hub: Hub, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(lost := next(n for n in tensors if n.endswith("q_proj.weight")))
    save_file(tensors, copy / "model.safetensors")
    hub.repositories[NAME] = Repository(copy)
    with pytest.raises(WeightsError, match=lost.rsplit("layers", 1)[1]):
        add_model(find_offer(NAME))
    assert read_record() == {}
    find_removal(NAME).execute()  # what was fetched need not stay
    assert find_added(NAME) is None


@pytest.mark.parametrize(("file", "words"), [("model.safetensors", "pickle"), ("tokenizer.json", "no tokenizer.json")])
def test_an_incomplete_model_is_refused_by_its_file_list(hub: Hub, copy: Path, file: str, words: str) -> None:
    (copy / file).unlink()
    hub.repositories[NAME] = Repository(copy)
    with pytest.raises(WeightsError, match=words):
        find_offer(NAME)
    assert hub.fetched() == []


def test_the_error_of_a_gated_model_explains_how_to_get_access(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository(published, gated=True)
    offer = find_offer(NAME)
    assert offer.is_gated
    with pytest.raises(WeightsError, match=rf"accept its licence on {hub.endpoint}/{NAME}.*hf auth login.*HF_TOKEN"):
        add_model(offer)
    assert fetched_weights(hub) == []
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert find_model(add_model(find_offer(NAME)).name).is_dir()


def test_a_token_goes_to_the_hub_and_not_on_to_storage(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository(published, gated=True)
    hub.redirects = True
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    added = add_model(find_offer(NAME))
    assert (Path(added.folder) / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    sent = {headers["host"].split(":")[0]: "authorization" in headers for _, _, headers in hub.journal}
    assert sent == {"127.0.0.1": True, "localhost": False}


def test_errors_of_the_hub_have_a_remedy(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="has no model some/other; check the name"):
        find_offer("some/other")
    with pytest.raises(WeightsError, match="has no revision 'v9'"):
        find_offer(f"{NAME}@v9")
    offer = find_offer(NAME)
    with pytest.raises(WeightsError, match=r"are free in .*HF_HUB_CACHE"):
        add_model(replace(offer, free_bytes=1000))
    assert hub.fetched() == []
    hub.is_down = True
    with pytest.raises(WeightsError, match="answered 503; try later"):
        find_offer(NAME)


def test_a_missing_network_is_reported(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = run("model", "add", NAME, "--yes")
    assert result.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("model", "add", NAME, "--yes")
    assert result.returncode == 1
    assert "unset it" in result.stderr
    assert hub.journal == []


def test_nothing_is_fetched_unasked(hub: Hub) -> None:
    result = run("model", "add", NAME)
    assert result.returncode == 2
    assert "apache-2.0" in result.stderr
    assert "--yes" in result.stderr
    assert hub.fetched() == []


@pytest.mark.parametrize(("licence", "is_permissive"), [("apache-2.0", True), ("gemma", False)])
def test_a_licence_that_is_not_permissive_has_a_warning(hub: Hub, licence: str, is_permissive: bool) -> None:
    hub.repositories[NAME] = Repository(hub.repositories[NAME].folder, licence=licence)
    result = run("model", "add", NAME)
    assert ("not a permissive licence: read it before you use the model" in result.stderr) is not is_permissive
    assert hub.fetched() == []


def test_a_known_licence_is_shown_if_the_hub_names_none(hub: Hub) -> None:
    for name, licence in (("Qwen/Qwen2.5-Coder-3B", "Qwen Research License"), (NAME, "not named; read its page")):
        hub.repositories[name] = Repository(hub.repositories[NAME].folder, licence="")
        assert find_offer(name).licence == licence


def run_and_answer(answer: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a terminal, and type an answer there."""
    typed, terminal = os.openpty()
    try:
        os.write(typed, answer.encode())
        command = [sys.executable, "-P", "-m", "fimserver.cli.main", *arguments]
        return subprocess.run(command, stdin=terminal, capture_output=True, text=True, timeout=120, check=False)
    finally:
        os.close(typed)
        os.close(terminal)


@pytest.mark.slow("starts commands and downloads a model from a local hub")
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_the_user_is_asked(hub: Hub) -> None:
    refused = run_and_answer("n\n", "model", "add", NAME)
    assert refused.returncode == 1
    assert "Download it?" in refused.stderr
    assert hub.fetched() == []
    agreed = run_and_answer("y\n", "model", "add", NAME)
    assert agreed.returncode == 0, agreed.stderr
    folder = find_model(NAME)
    assert run("model", "remove", NAME).returncode == 2
    kept = run_and_answer("n\n", "model", "remove", NAME)
    assert kept.returncode == 1
    assert "which other programs may share" in kept.stderr
    assert find_model(NAME) == folder
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model", "a/b/c", "../b", "a--b/c", "a/b@", "https://h/a/b", ""])
def test_a_wrong_name_is_wrong_use(name: str, hub: Hub) -> None:
    with pytest.raises(WeightsError, match="owner/name"):
        hub_module.parse_name(name)
    with pytest.raises(WeightsError):
        find_removal(name)
    assert hub.journal == []


def test_a_revision_is_kept(hub: Hub) -> None:
    commit = hub.repositories[NAME].commit
    added = add_model(find_offer(f"{NAME}@{commit}"))
    assert added.revision == added.commit == commit
    assert find_model(NAME) == find_model(f"{NAME}@{commit}") == Path(added.folder)
    assert find_added(f"{NAME}@{'0' * 40}") is None


def test_complete_files_cached_by_other_programs_are_found(hub: Hub) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(NAME, allow_patterns=["config.json", "tokenizer.json"])
    assert find_added(NAME) is None
    folder = snapshot_download(NAME)
    hub.is_down = True
    assert find_model(NAME) == Path(folder)
    assert read_record() == {}


def test_others_find_an_added_model_without_a_network(hub: Hub) -> None:
    from huggingface_hub import try_to_load_from_cache

    added = add_model(find_offer(NAME))
    assert try_to_load_from_cache(NAME, "model.safetensors") == str(Path(added.folder) / "model.safetensors")


def test_removing_one_revision_keeps_another(hub: Hub, copy: Path) -> None:
    old = add_model(find_offer(NAME))
    (copy / "README.md").write_text("Another text.\n")
    hub.repositories[NAME] = Repository(copy)
    hub.forget()
    new = add_model(find_offer(NAME))
    assert hub.fetched() == ["README.md"]
    assert new.commit != old.commit
    removal = find_removal(NAME)
    assert 0 < removal.num_bytes < 1000  # the weights are the other's too
    removal.execute()
    assert not Path(new.folder).exists()
    assert (Path(old.folder) / "model.safetensors").is_file()
    assert read_record() == {}


def test_the_list_shows_missing_and_available_models(hub: Hub) -> None:
    states = {one.name: one for one in list_models()}
    known = states["nvidia/diffusiongemma-26B-A4B-it-NVFP4"]
    assert (known.state, known.num_bytes, known.folder) == ("known", 18_864_434_565, None)
    added = add_model(find_offer(NAME))
    shutil.rmtree(added.folder)
    gone = next(one for one in list_models() if one.name == NAME)
    assert (gone.state, gone.num_bytes) == ("added", None)
    assert "its files are missing" in run("model", "list").stdout
    with pytest.raises(WeightsError, match=f"fimserver model add {NAME}"):
        find_model(NAME)
    removal = find_removal(NAME)
    removal.execute()
    assert read_record() == {}


def test_a_damaged_record_is_reported(hub: Hub) -> None:
    path = record_file()
    path.parent.mkdir(parents=True)
    path.write_text('{"models": []}')
    with pytest.raises(WeightsError, match=r"models\.json cannot be read"):
        read_record()


def test_the_hub_is_imported_for_an_unknown_name_alone(hub: Hub) -> None:
    add_model(find_offer(NAME))
    code = (
        "import sys; from fimserver.checkpoints.installed import find_added;"
        "print(find_added(sys.argv[1]) is not None, 'huggingface_hub' in sys.modules, 'torch' in sys.modules)"
    )
    for name, expected in ((NAME, "True False False"), ("/no/such", "False False False"), ("a/b", "False True False")):
        found = subprocess.run(
            [sys.executable, "-P", "-c", code, name], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        assert found.stdout.strip() == expected
