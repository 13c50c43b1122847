"""Choosing a model for a machine, changing config.toml, and the whole command."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.completion_server import serve

from fimserver.checkpoints.gpus import find_gpu
from fimserver.cli import machine as machine_module
from fimserver.cli.machine import FoundServer, Machine, list_gpus, look_at_machine, simulate_gpu
from fimserver.cli.setup import change_config, find_choice, list_choices, recommend
from fimserver.engine.kernels.driver import Device, Driver
from fimserver.errors import FimserverError, SettingsError

PLAIN = Machine(gpu=None, cores=8, memory_bytes=32 * 10**9, free_disk_bytes=500 * 10**9)


def with_gpu(name: str) -> Machine:
    return replace(PLAIN, gpu=simulate_gpu(find_gpu(name)))


def with_gpus(*reported: tuple[str, int, str]) -> Driver:
    """Return a driver that reports GPUs of these names, MiB and compute capabilities."""
    gpus = (Device(f"GPU-{name}", name, capability, mib * 2**20, mib * 2**20) for name, mib, capability in reported)
    return Driver("nvidia-smi", "580.82", "13.0", tuple(gpus))


@pytest.mark.parametrize(
    ("machine", "model"),
    [
        (PLAIN, "Qwen/Qwen2.5-Coder-0.5B"),
        (
            replace(PLAIN, gpu=list_gpus(with_gpus(("NVIDIA GeForce RTX 2080 Ti", 11264, "7.5")))[0]),
            "Qwen/Qwen2.5-Coder-0.5B",
        ),
        (replace(PLAIN, memory_bytes=2 * 10**9), "tiny"),
        (replace(PLAIN, memory_bytes=None), "tiny"),
        (replace(PLAIN, free_disk_bytes=10**8), "tiny"),
        (with_gpu("RTX 4060"), "Qwen/Qwen2.5-Coder-1.5B"),  # 8 GB
        (with_gpu("RTX 5080"), "Qwen/Qwen2.5-Coder-1.5B"),  # 16 GB: the 7B leaves no memory, the 3B has its licence
        (with_gpu("RTX 4090"), "nvidia/diffusiongemma-26B-A4B-it-NVFP4"),  # 24 GB
        (with_gpu("RTX 5090"), "nvidia/diffusiongemma-26B-A4B-it-NVFP4"),  # 32 GB
        (replace(with_gpu("RTX 5090"), free_disk_bytes=5 * 10**9), "Qwen/Qwen2.5-Coder-1.5B"),
    ],
)
def test_what_is_recommended(machine: Machine, model: str) -> None:
    choices = list_choices(machine)
    chosen = recommend(choices)
    assert chosen.model == model
    assert chosen.memory_bytes <= (machine.gpu.memory_bytes if machine.gpu else machine.memory_bytes or 2 * 10**9)
    assert chosen.licence == "Apache-2.0"
    assert choices[-1].model == "tiny", "the shipped model is always there"
    assert all(choice.ms is None or choice.ms > 0 for choice in choices)


def test_a_server_that_runs_already_comes_first() -> None:
    known = FoundServer("ollama", "http://127.0.0.1:11434", "qwen2.5-coder:1.5b", "Qwen2.5-Coder")
    other = FoundServer("vllm", "http://127.0.0.1:8000", "llama-3", "")
    chosen = recommend(list_choices(replace(PLAIN, servers=(other, known))))
    assert chosen.settings == {"engine": "ollama", "remote": {"url": known.url, "model": known.model}}
    assert find_choice(list_choices(replace(PLAIN, servers=(other, known))), "vllm", None).model == "llama-3"
    with pytest.raises(FimserverError, match=r"tiny \(local\)"):
        find_choice(list_choices(PLAIN), "ollama", None)


def test_gpus_are_those_of_the_driver() -> None:
    reported = [
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "8.9"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "8.9"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24463, "12.0"),
        ("NVIDIA H100 80GB HBM3", 81559, "9.0"),
        ("NVIDIA GeForce RTX 5090", 32607, "12.0"),
        ("NVIDIA GeForce RTX 5090 D", 32607, "12.0"),
        ("NVIDIA X", 0, ""),
        ("NVIDIA GB10", 0, "12.1"),
    ]
    found = list_gpus(with_gpus(*reported))
    listed = [gpu.listed.name if gpu.listed else None for gpu in found]
    laptop, sxm = "RTX 5090 Laptop", "H100 SXM"
    expected = ["RTX 4060 Ti 16 GB", "RTX 4060 Ti 8 GB", laptop, sxm, "RTX 5090", None, "DGX Spark"]
    assert listed == expected, "a similar name is another product"
    assert found[-1].memory_bytes == int(119.2 * 2**30), "the system's, which the driver does not report"
    unknown = replace(PLAIN, gpu=found[5])
    chosen = recommend(list_choices(unknown))
    assert chosen.where == "NVIDIA GeForce RTX 5090 D"
    assert chosen.ms is None, "its speed is not known"


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with serve(kind="ollama") as ollama, serve(fault="dead") as dead, serve(fault="html") as other:
        urls = {"ollama": ollama.url, "llamacpp-server": dead.url, "vllm": other.url}
        other.refused = lambda _body: True
        monkeypatch.setattr(machine_module, "USUAL_URLS", urls)
        monkeypatch.setattr(machine_module, "_SERVER_TIMEOUT_S", 0.5)
        yield


@pytest.mark.usefixtures("ports")
def test_servers_on_this_machine_are_found(tmp_path: Path) -> None:
    machine = look_at_machine(tmp_path / "not" / "there")
    assert [(server.engine, server.model, server.family) for server in machine.servers] == [
        ("ollama", "qwen2.5-coder-0.5b", "Qwen2.5-Coder")
    ]
    assert machine.cores > 0
    assert machine.free_disk_bytes > 0


VALUES = {"engine": "vllm", "remote": {"url": 'http://"a"', "model": "ü\\m"}, "model": "m"}


@pytest.mark.parametrize(
    "before",
    [
        "",
        "maxLines = 4\n",
        "# my settings\nmodel = 'old'   # why\nengine = \"local\"\nmaxLines = 4",
        "remote = { url = 'http://x', model = 'y' }\n[languages]\nlua = false\n",
        "modelX = 1\n",
        "\ufeffmaxLines = 4\r\nmodel = 'a'\r\n",
    ],
)
def test_config_keeps_what_it_has(tmp_path: Path, before: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(before, encoding="utf-8", newline="")
    changed = tomllib.loads(change_config(path, VALUES))
    assert changed == {**tomllib.loads(before.removeprefix("\ufeff")), **VALUES}
    assert path.read_bytes().decode() == before, "only the text is returned"
    assert "# my settings" in change_config(path, VALUES) or "# my" not in before


@pytest.mark.parametrize(
    "before",
    [
        "[remote]\nurl = 'http://x'\n",
        "model = '''\na\n'''\n",
        "x = '''\nmodel = 1\n'''\n",
        "maxLines = \n",
        "remote.url = 'x'\n",
    ],
)
def test_an_unusual_config_is_not_changed(tmp_path: Path, before: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(before)
    with pytest.raises(SettingsError, match='engine = "vllm"'):
        change_config(path, VALUES)


def run(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "FIMSERVER_HOME": str(home)}
    command = [sys.executable, "-m", "fimserver", "setup", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("gpu", ["RTX 4060", "RTX 5080", "RTX 4090", "RTX 5090"])
def test_a_dry_run_changes_nothing(tmp_path: Path, gpu: str) -> None:
    done = run(tmp_path, "--dry-run", "--gpu", gpu)
    assert done.returncode == 0, done.stderr
    assert gpu in done.stdout
    assert "1. download" in done.stderr
    assert str(tmp_path / "config" / "config.toml") in done.stderr
    assert not (tmp_path / "config").exists()


def test_the_shipped_model_is_set_up_and_answers(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text("maxLines = 3\n")
    done = run(tmp_path, "--model", "tiny", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"]["model"] == "tiny"
    written = tomllib.loads((tmp_path / "config" / "config.toml").read_text())
    assert written == {"maxLines": 3, "engine": "local", "model": "tiny"}
    assert "ok: tiny, " in done.stderr
    assert "fimserver lsp" in done.stderr
    again = run(tmp_path, "--model", "tiny", "--yes")
    assert again.returncode == 0, "it can be run again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "add --yes"),
        (("--gpu", "RTX 4090"), "add --dry-run"),
        (("--gpu", "RTX 9999", "--dry-run"), "not in the table"),
        (("--model", "no/such", "--dry-run"), "no such choice"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "config").exists()
