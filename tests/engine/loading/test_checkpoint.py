"""Any checkpoint of this class loads right, and any damage is an error that names the tensor."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    COMPRESSED_TENSORS_CONFIG,
    DECODER,
    ENCODER,
    EVERYTHING,
    EXPERTS_ONLY,
    IN_CONFIG,
    MODELOPT_CONFIG,
    Tensors,
    is_chosen,
    matrices_of,
    quantized,
    state_of,
    under,
    write_checkpoint,
)

from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.nvfp4 import Dialect, quantize
from fimserver.engine.kernels.packed import PackedExperts, PackedLinear
from fimserver.engine.loading import checkpoint
from fimserver.engine.loading.quantization_config import read_quantization
from fimserver.engine.loading.weights import CPU, load_weights
from fimserver.engine.modeling.backbone import causal_rows
from fimserver.engine.modeling.diffusion_gemma import DiffusionGemma
from fimserver.engine.modeling.model import Model
from fimserver.errors import WeightsError

CONTEXT = FimContext("def f(x):\n    return ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 8))


@pytest.fixture(scope="module")
def state(random_model: Model) -> Tensors:
    return state_of(random_model.reference)


def expanded(state: Tensors, chosen: tuple[str, ...]) -> Tensors:
    """Return the values that a file stands for: chosen matrices rounded, the rest unchanged."""
    result = dict(state)
    for name, tensor in state.items():
        if not is_chosen(name, tensor, chosen):
            continue
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            result[name] = torch.cat((quantize(gate).dequantize(), quantize(up).dequantize()), dim=1)
        elif name.endswith(("down_proj", "_proj.weight")):
            result[name] = quantize(tensor).dequantize()
    return result


def check_equals(folder: Path, expected: Tensors, *, rtol: float = 0.0) -> None:
    """Check that every weight of the folder, expanded, is the expected one; encoder and decoder share them."""
    network = load_weights(folder, dtype=torch.float32)
    found = network.state_dict()
    for name, tensor in expected.items():
        if "vision" not in name:
            assert torch.allclose(found[name], tensor.float(), rtol=rtol, atol=0), name
    for name, source in network.all_tied_weights_keys.items():
        assert network.get_parameter(name) is network.get_parameter(source), name


FILES: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "ModelOpt, its own file": (Dialect.MODELOPT, {"own_file": MODELOPT_CONFIG}),
    "ModelOpt, in config.json": (Dialect.MODELOPT, {"in_config": IN_CONFIG}),
    "compressed-tensors": (Dialect.COMPRESSED_TENSORS, {"in_config": COMPRESSED_TENSORS_CONFIG}),
    "not declared": (Dialect.MODELOPT, {}),
}


@pytest.mark.parametrize("path", [ENCODER, DECODER])
@pytest.mark.parametrize("chosen", [EXPERTS_ONLY, EVERYTHING], ids=["experts", "everything"])
@pytest.mark.parametrize("kind", FILES)
def test_every_dialect_scope_and_path(
    tmp_path: Path, random_folder: Path, state: Tensors, kind: str, chosen: tuple[str, ...], path: str
) -> None:
    dialect, configuration = FILES[kind]
    tensors = under(path, quantized(state, dialect, chosen=chosen))
    folder = write_checkpoint(tmp_path / "m", random_folder, tensors, **configuration)
    check_equals(folder, expanded(state, chosen), rtol=1e-6)  # 1 / (1 / scale) is not always scale


def test_matrices_and_scales_in_different_shards(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT), num_shards=5)
    check_equals(folder, expanded(state, EXPERTS_ONLY))


def test_floats_in_every_dtype(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    small = {n: t.float().clamp(-100, 100) for n, t in state.items()}
    mixed = {n: t.to(dtypes[i % 3]) for i, (n, t) in enumerate(sorted(small.items()))}
    folder = write_checkpoint(tmp_path / "m", random_folder, mixed)
    check_equals(folder, {n: mixed[n] for n in small})


def test_experts_in_floats_one_by_one(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    apart = {n: t for n, t in state.items() if ".experts." not in n}
    apart |= {f"{module}.weight": matrix for module, matrix in matrices_of(state) if ".experts." in module}
    check_equals(write_checkpoint(tmp_path / "m", random_folder, apart), state)


def test_stacks_in_4_bits_as_one_tensor(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    """One tensor for all experts of a layer, with one global scale for all or one for each."""
    tensors = {n: t for n, t in state.items() if ".experts." not in n}
    expected = dict(state)
    for name in (n for n in state if ".experts." in n):
        one_for_all = name.endswith("down_proj")
        highest = state[name].float().abs().max().reshape(1) / (6 * 448)
        whole = quantize(state[name], global_scale=highest if one_for_all else None)
        expected[name] = whole.dequantize()
        tensors[name] = whole.packed
        tensors[f"{name}_weight_scale"] = whole.scales
        scale = whole.global_scale.reshape(()) if one_for_all else whole.global_scale.reshape(-1)
        tensors[f"{name}_weight_scale_2"] = scale
    check_equals(write_checkpoint(tmp_path / "m", random_folder, tensors), expected)


def test_gate_and_up_have_scales_of_their_own(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    """One is a hundred times the other here, and neither rounds the other to nothing."""
    name = next(n for n in state if n.endswith("gate_up_proj"))
    gate, up = state[name].chunk(2, dim=1)
    changed = {**state, name: torch.cat((gate, up * 128), dim=1)}
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(changed, Dialect.MODELOPT))
    check_equals(folder, expanded(changed, EXPERTS_ONLY))


@pytest.mark.parametrize("scale", ["matrix", "vector", "row", "square"])
def test_float8(tmp_path: Path, random_folder: Path, state: Tensors, scale: str) -> None:
    tensors, expected = dict(state), dict(state)
    for name in [n for n in state if ".self_attn." in n and n.endswith("_proj.weight")]:
        weights = state[name].float()
        shape = {"matrix": (), "vector": (len(weights),), "row": (len(weights), 1), "square": (len(weights) // 16, 4)}[
            scale
        ]
        step = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
        tensors[name] = weights.clamp(-400, 400).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = step
        full = step[:, None] if scale == "vector" else step
        if scale == "square":
            full = step.repeat_interleave(16, 0).repeat_interleave(weights.shape[1] // 4, 1)
        expected[name] = tensors[name].float() * full
    mixed = quantized(tensors, Dialect.MODELOPT, chosen=EXPERTS_ONLY)  # all kinds in one file
    layers = {"model.decoder.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}}
    own = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    folder = write_checkpoint(tmp_path / "m", random_folder, mixed, own_file=own)
    check_equals(folder, expanded(expected, EXPERTS_ONLY))


def test_a_file_without_the_vision_tower(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    text = {n: t for n, t in state.items() if "vision" not in n}
    folder = write_checkpoint(tmp_path / "m", random_folder, text)
    check_equals(folder, text)
    assert load_weights(folder, dtype=torch.float32, keeps_vision=True).model.encoder.vision_tower is None


def test_the_vision_tower_is_kept_on_request(random_folder: Path) -> None:
    from transformers import DiffusionGemmaForBlockDiffusion

    ours = load_weights(random_folder, dtype=torch.float32, keeps_vision=True)
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(random_folder, dtype=torch.float32)
    for tensors in ("state_dict", "named_buffers"):
        found, expected = dict(getattr(ours, tensors)()), dict(getattr(theirs, tensors)())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert load_weights(random_folder, dtype=torch.float32).model.encoder.vision_tower is None


def test_copies_of_tied_weights_have_to_be_equal(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    both = {**state, name.replace(DECODER, ENCODER): state[name].clone()}
    both["lm_head.weight"] = state["model.decoder.embed_tokens.weight"].clone()
    check_equals(write_checkpoint(tmp_path / "a", random_folder, both), state)
    both["lm_head.weight"][7, 7] += 1
    with pytest.raises(WeightsError, match=r"and lm_head\.weight differ.* tied weights have to be equal"):
        load_weights(write_checkpoint(tmp_path / "b", random_folder, both), dtype=torch.float32)


EXPERT = "model.decoder.layers.2.experts.5"


def test_float8_in_blocks_of_128_whose_last_is_shorter() -> None:
    """192 rows of two scales are 128 and 64, not 96 and 96; 704 columns are five and a half blocks."""
    weights = torch.ones(192, 704).to(torch.float8_e4m3fn)
    scales = torch.arange(1, 13, dtype=torch.float32).view(2, 6)
    found = checkpoint._expand_fp8("m", {"weight": weights, "weight_scale_inv": scales}, torch.empty(192, 704))
    assert found[127, 0] == 1
    assert found[128, 0] == 7
    assert found[0, 639] == 5
    assert found[191, 640:].tolist() == [12.0] * 64


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 2, 6), (3, 192, 1), (192,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_slice_by_slice(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack read in slices of a few rows, which begin and end within blocks, equals one read at once."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 192, 704, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.5
    full = scale[:, None] if shape == (192,) else scale
    if shape == (3, 2, 6):
        full = scale.repeat_interleave(128, 1)[:, :192].repeat_interleave(128, 2)[:, :, :704]
    monkeypatch.setattr(checkpoint, "_FP8_SLICE", 704 * 50)
    parts = {"weight": weights, "weight_scale": scale}
    found = checkpoint._expand_fp8("m", parts, torch.empty(weights.shape, dtype=dtype))
    assert torch.equal(found, (weights.float() * full).to(dtype))
    weights.view(torch.uint8)[2, 191, 703] = 0x7F
    with pytest.raises(WeightsError, match=r"m\.weight has NaN"):
        checkpoint._expand_fp8("m", parts, torch.empty(weights.shape))


def test_a_router_in_4_bits_is_expanded(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    chosen = (".router.proj", ".experts.")
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT, chosen=chosen))
    network = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    name = "model.decoder.layers.0.router.proj.weight"
    assert torch.equal(network.get_parameter(name), quantize(state[name]).dequantize())


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing matrix": (lambda t: t.pop(f"{EXPERT}.up_proj.weight"), r"experts\.5\.up_proj has scales and no weights"),
    "missing expert": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{EXPERT}.up_proj.")],
        r"tensor model\.decoder\.layers\.2\.experts\.5\.up_proj\.weight is missing \(1 in all\)",
    ),
    "missing block scale": (lambda t: t.pop(f"{EXPERT}.up_proj.weight_scale"), r"up_proj\.weight_scale is missing"),
    "missing scale": (lambda t: t.pop(f"{EXPERT}.up_proj.weight_scale_2"), r"up_proj\.weight_scale_2 is missing"),
    "zero scale": (lambda t: t[f"{EXPERT}.up_proj.weight_scale_2"].zero_(), r"experts\.5\.up_proj: its global scale"),
    "a zero among scales": (
        lambda t: t[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3].zero_(),
        r"experts\.5\.up_proj: its weight_scale has values that are zero",
    ),
    "NaN among scales": (
        lambda t: t[f"{EXPERT}.up_proj.weight_scale"].view(torch.uint8)[3].fill_(0x7F),
        r"experts\.5\.up_proj: its weight_scale has values .* not finite",
    ),
    "one expert too many": (
        lambda t: t.update({f"{EXPERT[:-1]}8.up_proj.weight": t[f"{EXPERT}.up_proj.weight"].clone()}),
        r"experts\.8\.up_proj\.weight is not part of this model",
    ),
    "a scale of no module": (
        lambda t: t.update({"model.decoder.layers.9.mlp.up_proj.input_scale": torch.ones(())}),
        r"layers\.9\.mlp\.up_proj\.input_scale is not part of this model",
    ),
    "unknown part": (
        lambda t: t.update({f"{EXPERT}.up_proj.pre_quant_scale": torch.ones(64)}),
        r"pre_quant_scale is not part of this model",
    ),
    "wrong shape": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": t[f"{EXPERT}.up_proj.weight"][:, :16].clone()}),
        r"up_proj\.weight has shape \(32, 16\) \(in 4 bits: \(32, 32\)\), config\.json asks for \(32, 64\)",
    ),
    "scales of MXFP4": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight_scale": torch.ones(32, 2, dtype=torch.uint8)}),
        r"up_proj\.weight_scale is uint8 \(32, 2\); NVFP4 has float8_e4m3fn",
    ),
    "whole numbers": (
        lambda t: t.update({f"{EXPERT}.up_proj.weight": torch.ones(32, 64, dtype=torch.int32)}),
        r"up_proj\.weight is I32; floats, float8 e4m3 and NVFP4 can be loaded",
    ),
    "scales next to floats": (
        lambda t: t.update({"model.decoder.layers.0.mlp.up_proj.weight_scale": torch.ones(())}),
        r"layers\.0\.mlp\.up_proj has BF16 weights together with a weight_scale",
    ),
    "stored twice": (
        lambda t: t.update({f"{EXPERT[:-2]}.gate_up_proj": torch.ones(8, 64, 64).bfloat16()}),
        r"layers\.2\.experts\.gate_up_proj is stored twice, as one and in parts",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("keeps_nvfp4", [False, True])
def test_damage_is_named(tmp_path: Path, random_folder: Path, state: Tensors, damage: str, keeps_nvfp4: bool) -> None:
    change, message = DAMAGES[damage]
    tensors = {n: t.clone() for n, t in quantized(state, Dialect.MODELOPT).items()}
    change(tensors)
    folder = write_checkpoint(tmp_path / "m", random_folder, tensors)
    with pytest.raises(WeightsError, match=message):
        load_weights(folder, dtype=torch.float32, keeps_nvfp4=keeps_nvfp4)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_scales_of_activations_are_not_read(tmp_path: Path, random_folder: Path, state: Tensors, value: float) -> None:
    """Experts that no calibration text reached have worthless scales, and none of them is used."""
    tensors = {n: t.clone() for n, t in quantized(state, Dialect.MODELOPT).items()}
    tensors[f"{EXPERT}.up_proj.input_scale"].fill_(value)
    check_equals(write_checkpoint(tmp_path / "m", random_folder, tensors), expanded(state, EXPERTS_ONLY))


def test_a_configuration_that_contradicts_the_file_is_not_believed(
    tmp_path: Path, random_folder: Path, state: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = quantized(state, Dialect.MODELOPT)
    names = ("self_attn*", "mlp*")
    agreeing = [f"{path}layers.*.{n}" for path in (ENCODER, DECODER) for n in names] + ["re:.*self_conditioning.*"]
    own = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": agreeing}}
    load_weights(write_checkpoint(tmp_path / "a", random_folder, tensors, own_file=own), dtype=torch.float32)
    assert "config says otherwise" not in caplog.text
    own["quantization"]["exclude_modules"] = [*agreeing, f"{EXPERT}.*"]
    folder = write_checkpoint(tmp_path / "b", random_folder, tensors, own_file=own)
    check_equals(folder, expanded(state, EXPERTS_ONLY))
    assert "config and its files differ on the format of 3 matrices" in caplog.text
    assert f"{EXPERT}.gate_proj is NVFP4 there" in caplog.text or f"{EXPERT}.down_proj is NVFP4 there" in caplog.text


OTHERS = {"a.b": {"quant_algo": "SQ"}}
WHOLE_NUMBERS = {"g": {"weights": {"num_bits": 4, "type": "int"}}}


@pytest.mark.parametrize(
    ("own_file", "in_config", "message"),
    [
        ({"quantization": {"quant_algo": "INT4_AWQ"}}, None, r"hf_quant_config\.json has the algorithm 'INT4_AWQ'"),
        ({"quantization": {}}, None, "has the algorithm None"),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 32}}, None, "blocks of 32 weights; NVFP4 has 16"),
        ({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": OTHERS}}, None, "b has .* 'SQ'"),
        (None, {"quant_method": "gptq"}, r"config\.json: quantization_config has the method 'gptq'"),
        (None, {"quant_method": "compressed-tensors", "config_groups": WHOLE_NUMBERS}, "g has int weights of 4 bits"),
        (None, {"quant_method": "compressed-tensors"}, "has no config_groups"),
        (None, [], "is not an object"),
    ],
)  # fmt: skip
def test_kinds_that_cannot_be_read_are_refused(
    tmp_path: Path, random_folder: Path, state: Tensors, own_file: Any, in_config: Any, message: str
) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, state, own_file=own_file, in_config=in_config)
    with pytest.raises(WeightsError, match=message):
        load_weights(folder, dtype=torch.float32)


def test_module_formats_of_a_configuration(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, state, own_file=MODELOPT_CONFIG)
    found = read_quantization(folder)
    assert found is not None
    assert (found.method, found.algorithm) == ("modelopt", "NVFP4")
    assert found.format_of("model.decoder.layers.3.self_attn.q_proj") is None
    assert found.format_of("lm_head") is None
    assert found.format_of("model.decoder.layers.3.experts.0.up_proj") == "NVFP4"
    assert read_quantization(random_folder) is None


@pytest.mark.parametrize("chosen", [EXPERTS_ONLY, EVERYTHING], ids=["experts", "everything"])
def test_packed_weights_equal_expanded_ones(
    tmp_path: Path, random_folder: Path, state: Tensors, chosen: tuple[str, ...]
) -> None:
    """Through the server's network, the encoder's rows and the decoder's, and through transformers' own modules."""
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT, chosen=chosen))
    whole = load_weights(folder, dtype=torch.float32)
    packed = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    kinds = {type(m) for m in packed.modules()}
    assert PackedExperts in kinds
    assert (PackedLinear in kinds) == (chosen is EVERYTHING)
    metadata = Model.load(folder, CPU).metadata
    ids, canvas = [2, 9, 100, 4000, 17, 9, 100], torch.tensor([[5, 77, 4321, 9]])
    results = []
    for network in (whole, packed):
        model = Model(network, metadata)
        cache = model.new_cache()
        causal = model.encode_all(ids, cache)
        self_conditioning = model.network.to_self_conditioning(model.decode(canvas, cache, None)[0])
        results.append((causal, model.decode(canvas, cache, self_conditioning)))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.inference_mode():
        logits = [n(torch.tensor([ids]), decoder_input_ids=canvas).logits for n in (whole, packed)]
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_a_network_releases_the_weights_that_it_has_read(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT, chosen=EVERYTHING))
    reference = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    kept = Model(reference, Model.load(folder, CPU).metadata)
    before = kept.encode([2, 5, 9], kept.new_cache())
    emptied = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    network = DiffusionGemma(emptied, consumes=True)
    for layer in (*emptied.model.decoder.layers, *emptied.model.encoder.language_model.layers):
        assert not sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        assert all(m._weights is None for m in layer.modules() if isinstance(m, PackedLinear))
        assert layer.experts.gate_up is None
    with torch.inference_mode():
        hidden = network.forward(causal_rows([2, 5, 9], 0, CPU), network.new_cache())
    assert torch.equal(network.to_logits(hidden[-1:]), before)  # of one row, as above: more rows round differently


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.SPECULATIVE, Mode.AUTOREGRESSIVE])
def test_a_checkpoint_in_4_bits_completes(tmp_path: Path, random_folder: Path, state: Tensors, mode: Mode) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT))
    generation = Engine.load(str(folder), "cpu").complete(CONTEXT, Sampling(mode, seed=0, max_denoising_steps=4))
    assert generation.mode is mode
    assert generation.forward_passes


def test_weights_that_no_memory_holds_are_refused(
    tmp_path: Path, random_folder: Path, state: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT))
    monkeypatch.setattr("fimserver.engine.loading.weights.available_bytes", lambda: 1_000_000)
    with pytest.raises(WeightsError, match=r"take 0\.0 GB of memory on a CPU, and 0\.0 GB are free"):
        load_weights(folder, dtype=torch.float32)


def test_expanding_logs_its_memory(
    tmp_path: Path, random_folder: Path, state: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT))
    load_weights(folder, dtype=torch.float32)
    assert "weights in 4 bits are expanded for this CPU; all weights take 0.0 GB" in caplog.text
    caplog.clear()
    load_weights(random_folder, dtype=torch.float32)
    assert not caplog.text


def test_loading_reports_bytes_up_to_all_of_them(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT), num_shards=3)
    seen: list[tuple[int, int]] = []
    load_weights(folder, dtype=torch.float32, report=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert 0.5 * size < seen[-1][1] < size  # the vision tower and input scales are left out


PEAK = """
import resource, sys, torch
from pathlib import Path
from fimserver.engine.loading.weights import load_weights
torch.set_num_threads(1)
def resident(key): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
before = resident("VmRSS")
network = load_weights(Path(sys.argv[1]), dtype=torch.bfloat16, keeps_nvfp4=True)
print(before, resident("VmHWM"), resident("VmRSS"))
"""


@pytest.mark.slow("writes and loads large checkpoints")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("written", ["NVFP4", "float8"])
def test_peak_memory_is_the_final_size_and_a_shard(tmp_path: Path, random_folder: Path, written: str) -> None:
    """Half a gigabyte in eight files: the peak of loading is the final size, a shard, and what may be mapped.

    Experts are separate in 4 bits and stacked in float8, with half as many for the same size.
    """
    write = write_large if written == "NVFP4" else write_large_float8
    folder, shard_bytes = write(tmp_path / "large", random_folder, 8)
    printed = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    before, peak, after = map(int, printed.stdout.split())
    assert after - before > 0.4e9, "most of it is resident"
    assert peak - after < shard_bytes + 0.35e9


def empty_large(folder: Path, source: Path, num_experts: int) -> Any:
    """Return a network without weights; its config is in a sibling of the folder."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    values = json.loads((source / "config.json").read_text())
    sizes = {"hidden_size": 1024, "num_experts": num_experts, "moe_intermediate_size": 1024, "vocab_size": 8192}
    values["text_config"] |= sizes
    (folder.parent / "source").mkdir()
    (folder.parent / "source" / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        return DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_dict(values))


def write_large_float8(folder: Path, source: Path, num_shards: int) -> tuple[Path, int]:
    """Write a checkpoint of half a gigabyte, of stacks in float8; return it and its largest shard's size."""
    tensors: Tensors = {}
    for name, empty in state_of(empty_large(folder, source, 32)).items():
        tensors[name] = torch.full(empty.shape, 0.05, dtype=torch.bfloat16)
        if ".experts." in name:
            tensors[name] = torch.ones(empty.shape, dtype=torch.float8_e4m3fn)
            tensors[f"{name}_weight_scale"] = torch.full((*empty.shape[:2], 1), 0.05)
    write_checkpoint(folder, folder.parent / "source", tensors, num_shards=num_shards)
    return folder, max(p.stat().st_size for p in folder.glob("*.safetensors"))


def write_large(folder: Path, source: Path, num_shards: int) -> tuple[Path, int]:
    """Write a checkpoint of half a gigabyte, of random bytes in 4 bits; return it and its largest shard's size."""
    network = empty_large(folder, source, 64)
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for name, empty in state_of(network).items():
        if ".experts." not in name:
            tensors[name] = (torch.rand(empty.shape, generator=generator) * 0.05).bfloat16()
            continue
        for module, matrix in matrices_of({name: empty}):
            rows, columns = matrix.shape
            tensors[f"{module}.weight"] = torch.randint(
                256, (rows, columns // 2), generator=generator, dtype=torch.uint8
            )
            scales = torch.randint(32, 64, (rows, columns // 16), generator=generator, dtype=torch.uint8)
            tensors[f"{module}.weight_scale"] = scales.view(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale_2"] = torch.tensor(0.01)
    write_checkpoint(folder, folder.parent / "source", tensors, num_shards=num_shards)
    return folder, max(p.stat().st_size for p in folder.glob("*.safetensors"))


def test_packed_tensors_are_not_copied_wider(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    """Resident bytes of experts in 4 bits: half a byte a weight, a scale for 16, four bytes a row."""
    folder = write_checkpoint(tmp_path / "m", random_folder, quantized(state, Dialect.MODELOPT))
    network = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    for module in network.modules():
        if isinstance(module, PackedExperts):
            for stack in module.stacks():
                weights = math.prod(stack.shape)
                assert stack.num_bytes == weights // 2 + weights // 16 + 4 * math.prod(stack.shape[:-1])


def test_mixed_stacks_of_one_layer_are_expanded_both(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    mixed = quantized(state, Dialect.MODELOPT, chosen=(".down_proj",))
    folder = write_checkpoint(tmp_path / "m", random_folder, mixed)
    network = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    assert not any(isinstance(m, PackedExperts) for m in network.modules())
    assert isinstance(network.model.decoder.layers[0].mlp.down_proj, PackedLinear)


def test_a_changed_scale_changes_the_weight(tmp_path: Path, random_folder: Path, state: Tensors) -> None:
    """A test of the tests above, which would prove nothing if a scale were not used."""
    doubled = quantized(state, Dialect.MODELOPT, change=lambda w: replace(w, global_scale=w.global_scale * 2))
    plain = load_weights(
        write_checkpoint(tmp_path / "a", random_folder, quantized(state, Dialect.MODELOPT)), dtype=torch.float32
    )
    twice = load_weights(write_checkpoint(tmp_path / "b", random_folder, doubled), dtype=torch.float32)
    name = next(n for n in state if n.endswith("down_proj"))
    assert torch.equal(2 * plain.get_parameter(name), twice.get_parameter(name))
