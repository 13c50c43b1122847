"""A model folder in 4 bits: readable by us and compressed-tensors, stoppable and resumable, in bounded memory."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.checkpoints import (
    ENCODER,
    EVERYTHING,
    EXPERTS_ONLY,
    Tensors,
    is_chosen,
    matrices_of,
    state_of,
    under,
    write_checkpoint,
)

from fimserver.cli.main import main
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.nvfp4 import Dialect, dequantize, find_global_scale, from_parts, quantize, to_parts
from fimserver.engine.loading.quantization_config import read_quantization
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.model import Model
from fimserver.engine.quantize.calibration import measure_inputs
from fimserver.engine.quantize.plan import QuantizerOptions, _is_vision
from fimserver.engine.quantize.quantizer import quantize_folder
from fimserver.errors import FimserverError, WeightsError

CONTEXT = FimContext("def f(x):\n    return ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 8))
NEAREST = QuantizerOptions(searched=False)
TEXT = "def total(items):\n    return sum(item.price for item in items)\n\n\n" * 12


@pytest.fixture(scope="module")
def state(random_model: Model) -> Tensors:
    return state_of(random_model.reference)


@pytest.fixture(scope="module")
def source(random_folder: Path, state: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model in bf16."""
    return write_checkpoint(tmp_path_factory.mktemp("bf16") / "m", random_folder, state)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.py").write_text(TEXT)
    return tmp_path / "text.py"


def tensors_of(folder: Path) -> Tensors:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def modules_of(tensors: Tensors) -> dict[str, Tensors]:
    """Return the tensors of matrices in 4 bits, by module."""
    found: dict[str, Tensors] = {}
    for name in tensors:
        if name.endswith(".weight_scale"):
            module = name.removesuffix(".weight_scale")
            own = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            found[module] = own
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


SHARES = {"gate_proj": "gate up", "up_proj": "gate up", "q_proj": "q k v", "k_proj": "q k v", "v_proj": "q k v"}


@pytest.mark.parametrize("everything", [False, True], ids=["experts", "everything"])
def test_nearest_scales_are_the_reference_byte_for_byte(
    tmp_path: Path, source: Path, state: Tensors, everything: bool
) -> None:
    quantize_folder(str(source), tmp_path / "q", QuantizerOptions(everything=everything, searched=False))
    found = tensors_of(tmp_path / "q")
    chosen = EVERYTHING if everything else EXPERTS_ONLY
    matrices = {m: t for m, t in matrices_of(state) if is_chosen(f"{m}.", t, chosen)}
    highest: dict[tuple[str, str], torch.Tensor] = {}
    for module, matrix in matrices.items():
        owner, _, leaf = module.rpartition(".")
        key = owner, SHARES.get(leaf, leaf)
        highest[key] = torch.maximum(highest.get(key, torch.zeros(1)), matrix.float().abs().max().reshape(1))
    expected = {n: t for n, t in state.items() if not is_chosen(n, t, chosen)}
    for module, matrix in matrices.items():
        owner, _, leaf = module.rpartition(".")
        scale = find_global_scale(highest[owner, SHARES.get(leaf, leaf)])
        expected |= to_parts(module, quantize(matrix, global_scale=scale), Dialect.MODELOPT)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    assert {torch.uint8, torch.float8_e4m3fn} <= {t.dtype for t in found.values()}


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("single_bytes", [0, 10**9], ids=["shards", "one file"])
def test_our_loader_reads_the_result(tmp_path: Path, source: Path, dialect: Dialect, single_bytes: int) -> None:
    folder = tmp_path / "q"
    quantize_folder(str(source), folder, QuantizerOptions(True, dialect, single_bytes=single_bytes))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (single_bytes == 0)
    network = load_weights(folder, dtype=torch.float32)
    modules = modules_of(tensors_of(folder))
    assert len(modules) > 50
    for module, parts in modules.items():
        expected = dequantize(from_parts(module, parts))
        owner, _, leaf = module.rpartition(".")
        if ".experts." in module:
            layer, expert = owner.rsplit(".", 1)
            stack = network.get_parameter(f"{layer}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}")
            matrix = stack[int(expert)]
            if leaf != "down_proj":
                matrix = matrix.chunk(2)[leaf == "up_proj"]
        else:
            matrix = network.get_parameter(f"{module}.weight")
        assert torch.equal(matrix, expected), module


def test_configurations_list_what_is_in_4_bits(tmp_path: Path, source: Path) -> None:
    for dialect in Dialect:
        folder = tmp_path / dialect.value
        quantize_folder(str(source), folder, QuantizerOptions(dialect=dialect))
        found = read_quantization(folder)
        assert found is not None
        assert found.method == dialect.value
        written = modules_of(tensors_of(folder))
        assert all(found.format_of(module) == "NVFP4" for module in written)
        left = {n.removesuffix(".weight") for n, t in tensors_of(folder).items() if t.dim() > 1}
        left = {n for n in left if not any(n.startswith(m) for m in written)}
        assert left >= {"model.decoder.embed_tokens", "model.decoder.layers.0.router.proj"}
        assert not [n for n in left | {"lm_head"} if found.format_of(n) is not None]
        assert found.format_of("model.encoder.language_model.layers.0.self_attn.q_proj") is None
        assert (folder / "hf_quant_config.json").exists() == (dialect is Dialect.MODELOPT)


def test_compressed_tensors_reads_the_result(tmp_path: Path, source: Path, state: Tensors) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4", exc_type=ImportError)
        quantization = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    folder = tmp_path / "q"
    quantize_folder(str(source), folder, QuantizerOptions(dialect=Dialect.COMPRESSED_TENSORS))
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(values).config_groups["group_0"]
    matrices = dict(matrices_of(state))
    modules = modules_of(tensors_of(folder))
    assert modules.keys() == {m for m in matrices if ".experts." in m}
    for module, parts in modules.items():
        ours = dequantize(from_parts(module, parts))
        theirs = nvfp4.NVFP4PackedCompressor.decompress(dict(parts), scheme)["weight"].float()
        assert torch.allclose(theirs, ours, rtol=2**-7, atol=0), module  # theirs is in bf16
        exact = matrices[module].float()
        assert (theirs - exact).norm() / exact.norm() < 0.12, module


def test_names_of_the_source_are_kept(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    """Under the encoder's path, experts one by one, as well as stacked under the decoder's."""
    apart = {n: t for n, t in state.items() if ".experts." not in n}
    apart |= {f"{m}.weight": t for m, t in matrices_of(state) if ".experts." in m}
    source = write_checkpoint(tmp_path / "m", random_folder, under(ENCODER, apart))
    quantize_folder(str(source), tmp_path / "q", NEAREST)
    stacked = write_checkpoint(tmp_path / "s", random_folder, state)
    quantize_folder(str(stacked), tmp_path / "r", NEAREST)
    found, other = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "r")
    assert found.keys() == under(ENCODER, other).keys()
    assert f"{ENCODER}layers.0.experts.3.gate_proj.weight_scale_2" in found
    for name, tensor in under(ENCODER, other).items():
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_searched_scales_err_less_and_calibrated_ones_least_in_outputs(
    tmp_path: Path, source: Path, text: Path
) -> None:
    def errors(name: str, **options: Any) -> tuple[float, float]:
        report = quantize_folder(str(source), tmp_path / name, QuantizerOptions(everything=True, **options))
        assert len(report.layers) == len({layer.layer for layer in report.layers}) > 3
        return (
            sum(layer.weight_error for layer in report.layers),
            sum(layer.output_error or 0.0 for layer in report.layers),
        )

    nearest, searched = errors("a", searched=False)[0], errors("b")[0]
    assert searched < 0.92 * nearest
    plain = errors("c", searched=False, calibration=text)
    weighed = errors("d", calibration=text)
    assert plain[0] == nearest
    assert weighed[1] < 0.92 * plain[1]
    assert weighed[0] > searched, "the best scale for outputs is not the one nearest to the weights"


def test_inputs_are_measured_as_they_are(source: Path, text: Path) -> None:
    """Every column of every projection; also of self-conditioning, which the first canvas alone gives only zeros."""
    found = measure_inputs(source, text)
    network = load_weights(source, dtype=torch.bfloat16)
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.decoder") and "router" not in name:
            assert found[name].shape == (module.in_features,), name
            assert found[name].mean() == pytest.approx(1.0, abs=1e-3), name
            assert found[name].std() > 0, name
    experts: Any = network.get_submodule("model.decoder.layers.1.experts")
    assert found["model.decoder.layers.1.experts.gate_up_proj"].shape == experts.gate_up_proj.shape[2:]
    assert found["model.decoder.layers.1.experts.down_proj"].shape == experts.down_proj.shape[2:]


class StoppedError(Exception):
    """The run was interrupted."""


@pytest.mark.parametrize("calibrates", [False, True], ids=["plain", "calibrated"])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, source: Path, text: Path, calibrates: bool) -> None:
    options = QuantizerOptions(single_bytes=0, calibration=text if calibrates else None)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = quantize_folder(str(source), whole, options)

    def stop(_what: str, _done: int, _total: int) -> None:
        if list(stopped.glob("model-00001-*.safetensors")):
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_folder(str(source), stopped, options, report=stop)
    first = next(stopped.glob("model-00001-*.safetensors"))
    assert [p.name for p in stopped.glob("*.safetensors")] == [first.name]
    assert not (stopped / "config.json").exists()
    time = first.stat().st_mtime_ns
    assert quantize_folder(str(source), stopped, options) == expected
    assert first.stat().st_mtime_ns == time, "a finished shard is kept"
    assert bytes_of(stopped) == bytes_of(whole)
    assert quantize_folder(str(source), stopped, options) == expected


def test_a_run_that_was_killed_in_its_first_shard_begins_again(tmp_path: Path, source: Path) -> None:
    """Only the unfinished shard exists, without a record of its source."""
    target = tmp_path / "q"
    target.mkdir()
    (target / "model-00001-of-00003.safetensors.writing").write_bytes(b"half")
    quantize_folder(str(source), target, QuantizerOptions(single_bytes=0))
    assert not list(target.glob("*.writing"))
    assert (target / "config.json").exists()


def test_a_shard_that_was_cut_is_written_again(tmp_path: Path, source: Path) -> None:
    options = QuantizerOptions(single_bytes=0)
    quantize_folder(str(source), tmp_path / "q", options)
    before = bytes_of(tmp_path / "q")
    shard = next((tmp_path / "q").glob("model-00002-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    quantize_folder(str(source), tmp_path / "q", options)
    assert bytes_of(tmp_path / "q") == before


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    source = write_checkpoint(tmp_path / "m", random_folder, state)
    quantize_folder(str(source), tmp_path / "q")
    before = bytes_of(tmp_path / "q")
    with pytest.raises(WeightsError, match=r"was started with other options \(everything\); choose a new folder"):
        quantize_folder(str(source), tmp_path / "q", QuantizerOptions(everything=True))
    write_checkpoint(tmp_path / "m", random_folder, {n: t * 2 for n, t in state.items()})
    with pytest.raises(WeightsError, match=r"was started with other weights \(.*model\.safetensors"):
        quantize_folder(str(source), tmp_path / "q")
    assert bytes_of(tmp_path / "q") == before


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "novel.txt").write_text("mine")
    with pytest.raises(WeightsError, match="holds something else; choose a new folder"):
        quantize_folder(str(source), tmp_path / "q")
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["novel.txt"]
    for inside in (source, source / "q"):
        with pytest.raises(WeightsError, match="is in the model's own folder"):
            quantize_folder(str(source), inside)


def test_quantized_models_are_refused(tmp_path: Path, source: Path) -> None:
    quantize_folder(str(source), tmp_path / "q")
    with pytest.raises(WeightsError, match=r"is already quantized: its experts are in NVFP4; add --all"):
        quantize_folder(str(tmp_path / "q"), tmp_path / "r")
    (tmp_path / "q" / "hf_quant_config.json").unlink()
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is already quantized: its experts are in NVFP4; add --all"):
        quantize_folder(str(tmp_path / "q"), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["model.decoder.layers.1.experts.down_proj", "model.decoder.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, random_folder: Path, state: Tensors, name: str) -> None:
    damaged = {**state, name: state[name].clone()}
    damaged[name].view(-1)[-1] = torch.nan
    source = write_checkpoint(tmp_path / "m", random_folder, damaged)
    with pytest.raises(WeightsError, match=rf"tensor {name}.* has NaN or infinite values"):
        quantize_folder(str(source), tmp_path / "q")
    assert not list((tmp_path / "q").glob("model*"))


def test_a_disk_too_small_is_reported_before_writing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimserver.engine.quantize.quantizer.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"GB are needed and 0\.0 GB are free; choose another disk"):
        quantize_folder(str(source), tmp_path / "q")


def test_an_unusable_calibration_text_is_an_error(tmp_path: Path, source: Path) -> None:
    for content, message in ((b"", "is empty"), (b"\xff\xfe\xff", "cannot be read")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(FimserverError, match=message):
            quantize_folder(str(source), tmp_path / "q", QuantizerOptions(calibration=tmp_path / "text"))


def test_rows_of_partial_blocks_stay_in_floats(tmp_path: Path, random_folder: Path) -> None:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    values = json.loads((random_folder / "config.json").read_text())
    values["text_config"]["moe_intermediate_size"] = 24
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    network = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(values))
    tensors = state_of(network)
    source = write_checkpoint(tmp_path / "m", tmp_path / "c", tensors)
    report = quantize_folder(str(source), tmp_path / "q")
    name = "model.decoder.layers.0.experts.down_proj"
    assert f"{name} stays in floats: rows of 24 are not whole blocks of 16" in report.notes
    found = tensors_of(tmp_path / "q")
    assert torch.equal(found[name], tensors[name])
    assert "model.decoder.layers.0.experts.0.gate_proj.weight_scale" in found
    quantization = read_quantization(tmp_path / "q")
    assert quantization is not None
    assert quantization.format_of("model.decoder.layers.0.experts.0.down_proj") is None
    assert torch.equal(load_weights(tmp_path / "q", dtype=torch.float32).get_parameter(name), tensors[name].float())


def test_the_shipped_model_in_4_bits_completes(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    result = CliRunner().invoke(main, ["quantize", "tiny", str(folder), "--no-search", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["written_bytes"] < 0.9 * report["source_bytes"]
    assert [layer["matrices"] for layer in report["layers"]] == [3] * 8
    assert all(0.08 < layer["weight_error"] < 0.11 for layer in report["layers"])
    assert (folder / "MODEL_CARD.md").exists()
    generation = Engine.load(str(folder), "cpu").complete(CONTEXT, Sampling(Mode.SPECULATIVE, seed=0))
    assert generation.text.strip()


def test_the_command_shows_a_table_and_errors(tmp_path: Path, source: Path) -> None:
    command = ["quantize", str(source), str(tmp_path / "q"), "--no-search"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0
    assert "layer 0" in shown.stdout
    assert "all weights:" in shown.stdout
    refused = CliRunner().invoke(main, [*command, "--all"])
    assert refused.exit_code == 1
    assert "was started with other options (everything)" in refused.stderr


PEAK = """
import sys, torch
from pathlib import Path
from fimserver.engine.quantize.quantizer import quantize_folder
from fimserver.engine.quantize.plan import QuantizerOptions
from transformers import DiffusionGemmaForBlockDiffusion  # which quantizing imports, and which is no part of the model
torch.set_num_threads(1)
def resident(key): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
before = resident("VmRSS")
quantize_folder(sys.argv[1], Path(sys.argv[2]), QuantizerOptions("all" in sys.argv, searched=False, single_bytes=0))
print(before, resident("VmHWM"))
"""


@pytest.mark.slow("quantizes a model")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_less_than_the_model(tmp_path: Path, random_folder: Path) -> None:
    """At most 256 MB of the source's 0.6 GB, a layer in 4 bits and one matrix' working memory are resident."""
    source = write_large(tmp_path / "large", random_folder)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert size > 0.6e9
    for arguments in ([source, tmp_path / "q"], [tmp_path / "q", tmp_path / "all", "all"]):  # experts, then the rest
        command = [sys.executable, "-c", PEAK, *map(str, arguments)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = map(int, printed.stdout.split())
        assert peak - before < 0.4e9


def write_large(folder: Path, source: Path) -> Path:
    """Write a checkpoint of 0.6 GB in bf16."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    values = json.loads((source / "config.json").read_text())
    sizes = {"hidden_size": 1024, "num_experts": 24, "moe_intermediate_size": 1024, "vocab_size": 8192}
    values["text_config"] |= sizes
    (folder.parent / "source").mkdir()
    (folder.parent / "source" / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        network = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(values))
    tensors = {}
    for name, empty in state_of(network).items():
        if not _is_vision(name):
            tensors[name] = torch.empty(empty.shape, dtype=empty.dtype).uniform_(-0.05, 0.05)
    return write_checkpoint(folder, folder.parent / "source", tensors, num_shards=4)
