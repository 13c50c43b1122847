"""Two layers of the 26B at their real width, in NVIDIA's format: they load, equal floats, complete."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import MODELOPT_CONFIG, Tensors, matrices_of, write_checkpoint
from transformers import DiffusionGemmaConfig

from fimserver.checkpoints.known import KNOWN_MODELS, SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.datatypes import FimContext, Hole, HoleKind, Mode, Sampling
from fimserver.engine.engine import Engine
from fimserver.engine.kernels.packed import PackedExperts
from fimserver.engine.loading.weights import expected_shapes, load_weights
from fimserver.engine.modeling.model import Model
from fimserver.engine.vocabulary import Vocabulary

pytestmark = pytest.mark.slow("two layers at the real width of the 26B")

VOCABULARY = 8192  # the shipped tokenizer's; all else is the real size
LAYERS = ["sliding_attention", "full_attention"]
TOLERANCE = 0.01  # of the largest logit: the expanded weights are rounded to bf16 once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 0.9 GB of random codes and scales under published names, in three files."""
    base = tmp_path_factory.mktemp("full")
    values = json.loads((KNOWN_MODELS / "diffusiongemma-26b-a4b-it" / "config.json").read_text())
    text = {**values["text_config"], "num_hidden_layers": 2, "layer_types": LAYERS, "vocab_size": VOCABULARY}
    text.pop("per_layer_config", None)
    values |= {"text_config": text, "canvas_length": 8}
    (base / "source").mkdir()
    (base / "source" / "config.json").write_text(json.dumps(values))
    generator = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for name, shape in expected_shapes(DiffusionGemmaConfig.from_dict(values)).items():
        if "vision" in name:
            continue
        if ".experts." not in name:
            ones = "norm" in name or name.endswith(("scale", "layer_scalar"))
            # An almost undecided router would decide otherwise after a rounding.
            noise = torch.empty(shape).normal_(0, 4.0 if "router" in name else 0.02, generator=generator)
            tensors[name] = (torch.ones(shape) if ones else noise).bfloat16()
            continue
        for module, matrix in matrices_of({name: torch.empty(shape, device="meta")}):
            rows, columns = matrix.shape
            codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
            scales = torch.randint(48, 64, (rows, columns // 16), generator=generator, dtype=torch.uint8)
            tensors[f"{module}.weight"] = codes
            tensors[f"{module}.weight_scale"] = scales.view(torch.float8_e4m3fn)
            tensors[f"{module}.weight_scale_2"] = torch.tensor(0.007 if "up_proj" in module else 0.006)
            tensors[f"{module}.input_scale"] = torch.tensor(0.01)
    written = write_checkpoint(base / "m", base / "source", tensors, own_file=MODELOPT_CONFIG, num_shards=3)
    shutil.rmtree(base / "source")
    return written


def test_real_shapes_load_equal_floats_and_complete(folder: Path) -> None:
    packed = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True)
    gate_up, down = next(m for m in packed.modules() if isinstance(m, PackedExperts)).stacks()
    assert gate_up.shape == (128, 1408, 2816)
    assert down.shape == (128, 2816, 704)
    full = packed.model.decoder.layers[1].self_attn
    assert full.v_proj is None
    assert tuple(full.q_proj.weight.shape) == (16 * 512, 2816)
    assert tuple(full.k_proj.weight.shape) == (2 * 512, 2816)

    tiny = read_metadata(SHIPPED_MODELS / "tiny")
    metadata = replace(tiny, name="full", calibration={}, commit_probability=0.0, languages=())
    model = Model(packed, metadata)
    ids, canvas = [2, 9, 100], torch.tensor([[5, 77]])
    cache = model.new_cache()
    causal = model.encode_all(ids, cache)
    decoded = model.decode(canvas, cache, None)[0]

    whole = load_weights(folder, dtype=torch.bfloat16).float()  # as a bf16 checkpoint would hold them
    with torch.inference_mode():
        expected = whole(torch.tensor([ids]), decoder_input_ids=canvas).logits[0]
    fresh = Model(whole, metadata)
    for found, floats in ((causal, fresh.encode_all(ids, fresh.new_cache())), (decoded, expected)):
        assert float((found - floats).abs().max()) <= TOLERANCE * float(floats.abs().max())
    del whole, fresh

    vocabulary = Vocabulary.load(SHIPPED_MODELS / "tiny" / "tokenizer.json", metadata.special_ids)
    context = FimContext("x = ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 4))
    sampling = Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=2, min_tokens=1, without=("grammar",))
    generation = Engine(model, vocabulary).complete(context, sampling)
    assert generation.text.strip()
    assert generation.denoising_steps >= 2
