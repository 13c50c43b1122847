"""A checkpoint whose experts are in NVFP4: the rest is quantized, and the experts are copied byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.checkpoints import (
    COMPRESSED_TENSORS_CONFIG,
    ENCODER,
    MODELOPT_CONFIG,
    Tensors,
    quantized,
    state_of,
    under,
    write_checkpoint,
)

from fimserver.checkpoints.memory import Format, Role, read_folder
from fimserver.cli.main import main
from fimserver.engine.kernels.nvfp4 import Dialect
from fimserver.engine.kernels.packed import PackedExperts, PackedLinear
from fimserver.engine.loading.quantization_config import read_quantization
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.model import Model
from fimserver.engine.quantize.plan import QuantizerOptions
from fimserver.engine.quantize.quantizer import quantize_folder
from fimserver.errors import WeightsError

ALL = QuantizerOptions(everything=True)
PROMPT, CANVAS = torch.arange(20, 40)[None], 8


@pytest.fixture(scope="module")
def state(random_model: Model) -> Tensors:
    return state_of(random_model.reference)


def write_source(folder: Path, like: Path, tensors: Tensors, dialect: Dialect, num_shards: int = 1) -> Path:
    own: dict[str, Any] = (
        {"own_file": MODELOPT_CONFIG} if dialect is Dialect.MODELOPT else {"in_config": COMPRESSED_TENSORS_CONFIG}
    )
    return write_checkpoint(folder, like, tensors, num_shards=num_shards, **own)


def tensors_of(folder: Path) -> Tensors:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def bytes_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist())


def is_scale_of_activations(name: str) -> bool:
    return name.endswith(("input_scale", "input_global_scale"))


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("path", ["decoder", "encoder"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_experts_are_copied_and_the_rest_is_quantized_as_from_floats(
    tmp_path: Path, random_folder: Path, state: Tensors, dialect: Dialect, path: str, num_shards: int
) -> None:
    named = under(ENCODER, state) if path == "encoder" else state
    given = under(ENCODER, quantized(state, dialect)) if path == "encoder" else quantized(state, dialect)
    source = write_source(tmp_path / "m", random_folder, given, dialect, num_shards)
    report = quantize_folder(str(source), tmp_path / "q", ALL)
    assert report.dialect == dialect
    floats = write_checkpoint(tmp_path / "f", random_folder, named)
    quantize_folder(str(floats), tmp_path / "g", QuantizerOptions(everything=True, dialect=dialect))
    found, from_floats = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "g")
    assert found.keys() == from_floats.keys()
    experts = {name for name in given if ".experts." in name and not is_scale_of_activations(name)}
    assert len(experts) > 50
    assert experts == {name for name in found if ".experts." in name}
    for name, tensor in found.items():
        assert bytes_of(tensor) == bytes_of((given if name in experts else from_floats)[name]), name
    attention = [name for name in found if ".self_attn.q_proj" in name and name.endswith("weight_scale")]
    assert attention
    assert any(bytes_of(found[name]) != bytes_of(from_floats[name]) for name in experts), "scales were not searched"


@pytest.mark.parametrize("dialect", list(Dialect))
def test_the_result_loads_with_only_the_rest_changed(
    tmp_path: Path, random_folder: Path, state: Tensors, dialect: Dialect
) -> None:
    source = write_source(tmp_path / "m", random_folder, quantized(state, dialect), dialect)
    quantize_folder(str(source), tmp_path / "q", ALL)
    packed = load_weights(tmp_path / "q", dtype=torch.float32, keeps_nvfp4=True)
    layers = packed.config.text_config.num_hidden_layers
    assert sum(isinstance(module, PackedExperts) for module in packed.modules()) >= layers
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) > 6 * layers
    before, after = (load_weights(folder, dtype=torch.float32) for folder in (source, tmp_path / "q"))
    changed = []
    for name, parameter in before.named_parameters():
        weight = parameter.detach()
        own = after.get_parameter(name).detach()
        if not torch.equal(own, weight):
            changed.append(name)
            assert float((own - weight).norm() / weight.norm()) < 0.15, name
    assert changed
    assert all(any(part in name for part in (".self_attn.", ".mlp.", ".self_conditioning.")) for name in changed)


def test_logits_are_near_the_sources(tmp_path: Path) -> None:
    """Of the shipped model: random weights route to other experts after the smallest change."""
    quantize_folder("tiny", tmp_path / "m")
    quantize_folder(str(tmp_path / "m"), tmp_path / "q", ALL)
    before, after = (load_weights(tmp_path / name, dtype=torch.float32) for name in ("m", "q"))
    canvas = torch.arange(500, 500 + CANVAS)[None]
    with torch.inference_mode():
        logits = [one(PROMPT, decoder_input_ids=canvas).logits.float() for one in (before, after)]
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 0.01 < error < 0.15, "as large as the rounding of weights"


def test_configurations_and_the_planner_agree_with_the_files(
    tmp_path: Path, random_folder: Path, state: Tensors
) -> None:
    source = write_source(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT), Dialect.MODELOPT)
    quantize_folder(str(source), tmp_path / "q", ALL)
    found = read_quantization(tmp_path / "q")
    assert found is not None
    assert (found.method, found.algorithm) == ("modelopt", "W4A16_NVFP4"), "weights only"
    written = tensors_of(tmp_path / "q")
    assert not [name for name in written if is_scale_of_activations(name)]
    modules = {name.removesuffix(".weight_scale") for name in written if name.endswith(".weight_scale")}
    assert all(found.format_of(module) == "NVFP4" for module in modules)
    assert found.format_of("model.decoder.embed_tokens") is None
    planned = read_folder(tmp_path / "q")
    expected = read_folder(source).with_projections_in_nvfp4()
    roles = (Role.EXPERTS, Role.ATTENTION, Role.DENSE, Role.SELF_CONDITIONING)
    assert {p.role: p.format for p in planned.parts if p.role in roles} == dict.fromkeys(roles, Format.NVFP4)
    assert planned.bytes_of(*roles) == expected.bytes_of(*roles), "what the remedy promises"


def test_twice_is_as_once(tmp_path: Path) -> None:
    """The shipped model's experts first and the rest later: the files of ``quantize --all``, tensor for tensor."""
    shown = [
        CliRunner().invoke(main, ["quantize", *arguments, "--no-search"])
        for arguments in (
            ("tiny", str(tmp_path / "e")),
            (str(tmp_path / "e"), str(tmp_path / "twice"), "--all"),
            ("tiny", str(tmp_path / "once"), "--all"),
        )
    ]
    assert [result.exit_code for result in shown] == [0, 0, 0], shown
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert once.keys() == twice.keys()
    assert all(bytes_of(once[name]) == bytes_of(twice[name]) for name in once)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice")]
    assert configs[0] == configs[1]


def test_a_stopped_run_resumes(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    source = write_source(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT), Dialect.MODELOPT)
    options = QuantizerOptions(everything=True, single_bytes=0)
    quantize_folder(str(source), tmp_path / "whole", options)

    def stop(_what: str, _done: int, _total: int) -> None:
        if list((tmp_path / "q").glob("model-00001-*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(str(source), tmp_path / "q", options, report=stop)
    quantize_folder(str(source), tmp_path / "q", options)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "q" / path.name).read_bytes(), path.name


def test_a_calibration_text_weighs_the_rest(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    source = write_source(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT), Dialect.MODELOPT)
    text = tmp_path / "text.py"
    text.write_text("def total(items):\n    return sum(item.price for item in items)\n" * 12)
    report = quantize_folder(str(source), tmp_path / "q", QuantizerOptions(everything=True, calibration=text))
    assert all(layer.output_error for layer in report.layers)
    quantize_folder(str(source), tmp_path / "p", ALL)
    own, plain = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "p")
    differing = {name for name in own if bytes_of(own[name]) != bytes_of(plain[name])}
    assert differing
    assert not [name for name in differing if ".experts." in name]


def test_what_cannot_be_quantized_again_is_refused(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    modelopt = quantized(state, Dialect.MODELOPT)
    source = write_source(tmp_path / "m", random_folder, modelopt, Dialect.MODELOPT)
    with pytest.raises(WeightsError, match=r"its experts are in NVFP4; add --all"):
        quantize_folder(str(source), tmp_path / "q")
    other = QuantizerOptions(everything=True, dialect=Dialect.COMPRESSED_TENSORS)
    with pytest.raises(WeightsError, match=r"NVFP4 by modelopt's names, which are kept; leave out --format"):
        quantize_folder(str(source), tmp_path / "q", other)
    quantize_folder(str(source), tmp_path / "all", ALL)
    with pytest.raises(WeightsError, match=r"is already quantized: all that can be is in NVFP4"):
        quantize_folder(str(tmp_path / "all"), tmp_path / "q", ALL)
    name = "model.decoder.layers.0.self_attn.q_proj"
    in_float8 = {**modelopt, f"{name}.weight": modelopt[f"{name}.weight"].to(torch.float8_e4m3fn)}
    in_float8[f"{name}.weight_scale"] = torch.tensor(1.0)
    folder = write_source(tmp_path / "fp8", random_folder, in_float8, Dialect.MODELOPT)
    with pytest.raises(WeightsError, match=rf"is already quantized \({name}.weight is float8\); quantize the float"):
        quantize_folder(str(folder), tmp_path / "q", ALL)
    assert not (tmp_path / "q").exists()


def test_experts_partly_in_floats_are_refused(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    module = "model.decoder.layers.0.experts.1.gate_proj"
    mixed = {n: t for n, t in quantized(state, Dialect.MODELOPT).items() if not n.startswith(f"{module}.")}
    mixed[f"{module}.weight"] = state["model.decoder.layers.0.experts.gate_up_proj"][1].chunk(2)[0].clone()
    folder = write_source(tmp_path / "m", random_folder, mixed, Dialect.MODELOPT)
    with pytest.raises(WeightsError, match=rf"is in floats and in NVFP4 \({module} is in floats\)"):
        quantize_folder(str(folder), tmp_path / "q", ALL)


def test_damaged_scales_are_named(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    tensors = quantized(state, Dialect.MODELOPT)
    name = "model.decoder.layers.0.experts.0.down_proj.weight_scale"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8).view(-1)[3] = 0x7F
    folder = write_source(tmp_path / "m", random_folder, tensors, Dialect.MODELOPT)
    with pytest.raises(WeightsError, match=rf"tensor {name} has NaN or infinite values"):
        quantize_folder(str(folder), tmp_path / "q", ALL)
