"""Dense models in 4 bits: every projection, with or without a calibration text, for both kinds of attention."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.dense import write_fim_model, write_masked_model

from fimserver.engine.kernels.packed import PackedLinear
from fimserver.engine.loading.checkpoint import Checkpoint
from fimserver.engine.loading.weights import expected_shapes, load_weights, read_config
from fimserver.engine.modeling.backbone import causal_rows
from fimserver.engine.modeling.qwen2 import Qwen2
from fimserver.engine.quantize.plan import QuantizerOptions
from fimserver.engine.quantize.quantizer import quantize_folder

Write = Callable[[Path], Path]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("write", [write_fim_model, write_masked_model])
def test_a_dense_model_is_quantized(write: Write, tmp_path: Path, *, calibrated: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source)
    text = tmp_path / "text.py"
    text.write_text("def area(width, height):\n    return width * height\n" * 20)
    options = QuantizerOptions(calibration=text if calibrated else None)
    summary = quantize_folder(str(source), target, options)
    layers = read_config(source).num_hidden_layers
    assert sum(row.matrices for row in summary.layers) == 7 * layers
    checkpoint = Checkpoint.open(target, expected_shapes(read_config(target)))
    packed = {name for name, one in checkpoint.targets.items() if one.is_nvfp4}
    assert len(packed) == 7 * layers
    assert all("_proj.weight" in name for name in packed)
    network = load_weights(target, dtype=torch.float32, keeps_nvfp4=True)
    assert sum(isinstance(module, PackedLinear) for module in network.modules()) == 7 * layers
    expanded = load_weights(target, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for one in (network, expanded):
            backbone = Qwen2(one)
            hidden = backbone.forward(causal_rows(list(range(10, 30)), 0, backbone.device), backbone.new_cache())
            found.append(backbone.to_logits(hidden))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("write", [write_fim_model, write_masked_model])
def test_the_error_of_4_bits_is_small(write: Write, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source)
    quantize_folder(str(source), target, QuantizerOptions())
    weights = load_weights(target, dtype=torch.float32).state_dict()
    whole = load_weights(source, dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.gate_proj.weight"
    error = (weights[name] - whole[name]).norm() / whole[name].norm()
    assert 0.01 < float(error) < 0.15
    assert torch.equal(weights["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(weights[bias], whole[bias])


def test_a_model_that_is_in_4_bits_already_is_refused(tmp_path: Path) -> None:
    from fimserver.errors import WeightsError

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_fim_model(source)
    quantize_folder(str(source), target, QuantizerOptions())
    with pytest.raises(WeightsError, match="is already quantized"):
        quantize_folder(str(target), tmp_path / "again", QuantizerOptions())
