"""Skeletons, compared with transformers' classes: names, shapes, ties, constants, and what the networks compute."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import EVERYTHING, Tensors, quantized, state_of, write_checkpoint
from support.dense import write_fim_model, write_masked_model
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedModel

from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.engine.kernels.nvfp4 import Dialect
from fimserver.engine.kernels.packed import find_packed_experts
from fimserver.engine.loading.skeleton import Skeleton, create_skeleton, has_skeleton
from fimserver.engine.loading.weights import load_weights, read_config
from fimserver.engine.modeling.model import Model

TINY = SHIPPED_MODELS / "tiny"
KINDS = ("tiny", "random", "packed", "fim", "masked")
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, random_model: Model, random_folder: Path, tmp_path: Path) -> Path:
    if request.param == "packed":
        tensors: Tensors = quantized(state_of(random_model.reference), Dialect.MODELOPT, chosen=EVERYTHING)
        return write_checkpoint(tmp_path / "packed", random_folder, tensors)
    (tmp_path / "dense").mkdir()
    if request.param == "fim":
        write_fim_model(tmp_path / "dense")
        shutil.copy(next(KNOWN_MODELS.glob("qwen2.5-coder-0.5b/fimserver.json")), tmp_path / "dense")
        return tmp_path / "dense"
    if request.param == "masked":
        return write_masked_model(tmp_path / "dense")
    return TINY if request.param == "tiny" else random_folder


def tensors_of(network: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return parameters, buffers and what files hold, by name; tied ones under each name."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    buffers = dict(network.named_buffers(remove_duplicate=False))
    return {"parameters": parameters, "buffers": buffers, "state": network.state_dict()}


def compare_values(ours: Any, theirs: Any) -> None:
    found, expected = tensors_of(ours), tensors_of(theirs)
    for kind in expected:
        assert list(found[kind]) == list(expected[kind])
        for name, tensor in expected[kind].items():
            assert found[kind][name].dtype is tensor.dtype, name
            assert torch.equal(found[kind][name], tensor), name


def create_theirs(config: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        if isinstance(config, Qwen2Config):
            return Qwen2ForCausalLM(config)
        network: Any = DiffusionGemmaForBlockDiffusion(config)
    network.model.encoder.vision_tower = network.model.encoder.embed_vision = None
    return network


@torch.inference_mode()
def compute(network: Any, folder: Path) -> list[torch.Tensor]:
    """Return the logits of a prompt, of a canvas after it, and of one under self-conditioning."""
    model = Model(network, read_metadata(folder))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, model.vocab_size, (60,), generator=generator)
    cache = model.new_cache()
    found = [model.encode_all(ids.tolist(), cache)]
    canvas = torch.randint(8, model.vocab_size, (1, 12), generator=generator)
    found.append(model.decode(canvas, cache, None))
    if hasattr(network, "final_logit_softcapping"):
        found.append(model.decode(canvas, cache, model.network.to_self_conditioning(found[-1][0])))
    return found


def test_a_loaded_skeleton_equals_transformers_class(folder: Path) -> None:
    ours = load_weights(folder, dtype=torch.float32, for_inference=True)
    theirs = load_weights(folder, dtype=torch.float32)
    assert isinstance(ours, Skeleton)
    assert isinstance(theirs, PreTrainedModel)
    assert ours.training is theirs.training is False
    assert (ours.device, ours.dtype) == (theirs.device, theirs.dtype)
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys
    compare_values(ours, theirs)
    for name, source in ours.all_tied_weights_keys.items():
        assert ours.get_parameter(name) is ours.get_parameter(source)
    for found, expected in zip(compute(ours, folder), compute(theirs, folder), strict=True):
        assert torch.equal(found, expected)


def test_weights_stay_in_4_bits(random_model: Model, random_folder: Path, tmp_path: Path) -> None:
    tensors: Tensors = quantized(state_of(random_model.reference), Dialect.MODELOPT, chosen=EVERYTHING)
    folder = write_checkpoint(tmp_path / "packed", random_folder, tensors)
    load = partial(load_weights, folder, dtype=torch.float32, keeps_nvfp4=True)
    ours, theirs = load(for_inference=True), load()
    assert len(find_packed_experts(ours)) == len(find_packed_experts(theirs)) > 0
    compare_values(ours, theirs)
    for found, expected in zip(compute(ours, folder), compute(theirs, folder), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(KNOWN_MODELS.glob("*/config.json"))])
def test_every_known_model_has_a_skeleton_with_the_names_of_its_weights(name: str) -> None:
    config = read_config(KNOWN_MODELS / name, for_inference=True)
    assert has_skeleton(config)
    ours, theirs = create_skeleton(config), create_theirs(read_config(KNOWN_MODELS / name))
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys
    found, expected = tensors_of(ours), tensors_of(theirs)
    for kind in expected:
        assert list(found[kind]) == list(expected[kind])
        for each, tensor in expected[kind].items():
            assert found[kind][each].shape == tensor.shape, each
            assert found[kind][each].is_meta, each


@pytest.mark.parametrize("rotation", [YARN, LLAMA, LINEAR])
def test_rotations_of_dense_models(tmp_path: Path, rotation: dict[str, Any]) -> None:
    folder = write_masked_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rotation}))
    ours = load_weights(folder, dtype=torch.float32, for_inference=True)
    theirs = load_weights(folder, dtype=torch.float32)
    assert isinstance(ours, Skeleton)
    compare_values(ours, theirs)
    for found, expected in zip(compute(ours, folder), compute(theirs, folder), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("full", [FULL, {**LINEAR, "partial_rotary_factor": 1.0}])
def test_rotations_of_each_kind_of_layer(random_folder: Path, tmp_path: Path, full: dict[str, Any]) -> None:
    folder = tmp_path / "random"
    shutil.copytree(random_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"full_attention": full, "sliding_attention": SLIDING}
    (folder / "config.json").write_text(json.dumps(config))
    ours: Any = load_weights(folder, dtype=torch.float32, for_inference=True)
    theirs = load_weights(folder, dtype=torch.float32)
    assert has_skeleton(ours.config)
    compare_values(ours, theirs)
    positions = torch.arange(50)[None]
    for kind in ("full_attention", "sliding_attention"):
        found = ours.model.decoder.rotary_emb(torch.zeros(1), positions, kind)
        expected = theirs.model.decoder.rotary_emb(torch.zeros(1), positions, kind)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_activation": "relu"}, {"rope_parameters": {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}, "sliding_attention": SLIDING}}],
)  # fmt: skip
def test_a_configuration_without_a_skeleton_loads_as_transformers_class(
    random_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "random"
    shutil.copytree(random_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_weights(folder, dtype=torch.float32, for_inference=True)
    assert isinstance(loaded, DiffusionGemmaForBlockDiffusion)
    assert loaded.model.encoder.vision_tower is None


def test_biases_of_attention_have_no_skeleton(random_folder: Path) -> None:
    config = read_config(random_folder)
    assert has_skeleton(config)
    config.text_config.attention_bias = True
    assert not has_skeleton(config)


@pytest.mark.parametrize("kind", ["tiny", "masked"])
def test_loading_for_inference_imports_neither_torchs_compiler_nor_transformers_classes(
    kind: str, tmp_path: Path
) -> None:
    """They take longer to import than torch, and a user waits for the first completion."""
    folder = TINY if kind == "tiny" else write_masked_model(tmp_path)
    code = """
import sys
from fimserver.engine.worker import load_engine
load_engine(sys.argv[1], "cpu", 1)
heavy = {"torch._dynamo", "torch.distributed.tensor", "sympy"}
heavy |= {"transformers" if "tiny" in sys.argv[1] else "transformers.modeling_utils", "transformers.activations"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
