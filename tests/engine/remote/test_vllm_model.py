"""The forward pass, compared with vLLM's implementation of the same class, which shares no code with transformers'.

The tests compare the log-probabilities of the first denoising step of a canvas. vLLM 0.32 differs from transformers in
two ways, and fimserver follows transformers:

- vLLM has one scalar for each layer, and takes the encoder's. The models of these tests have the same in both passes.
- In a sliding layer, vLLM counts the window of a canvas position from that position. transformers counts it from the
  beginning of the canvas. A step with ``slides`` has a prompt where that matters, and is computed in vLLM's way.

Weights in 4 bits are quantized and loaded by fimserver, and served in float32 after ``support.expanded`` has expanded
the same files by the definition of NVFP4. vLLM 0.32 does not read the files on a CPU: it has no backend for NVFP4
experts there ("No NvFp4 MoE backend supports the deployment configuration", by ModelOpt's names in bf16 and by
compressed-tensors' in float32), and refuses ModelOpt's names in float32. So these steps compare quantized files, loader
and forward pass with vLLM's forward pass over other code's numbers, not with vLLM's reading of NVFP4.

The answers of a server are recorded, so that every run compares them. To compare with a running server, start vLLM with
the shipped model, with the random network of many experts, and with its two quantized variants, each on its own port:

    vllm serve fimserver/models/tiny --max-model-len 768 --dtype float32 --diffusion-config '{"canvas_length":32}'
    PYTHONPATH=tests:. python -m support.random_network FOLDER
    PYTHONPATH=tests:. python -m support.random_network FOLDER --nvfp4 experts
    PYTHONPATH=tests:. python -m support.random_network FOLDER --nvfp4 everything
    vllm serve FOLDER --max-model-len 768 --dtype float32 --diffusion-config '{"canvas_length":16}'

Then set the variables of ``VARIABLES`` to their addresses; ``--update`` records again.
"""

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from support.expanded import digest_of, expand_nvfp4
from support.random_network import digest, make_served_network, save_quantized_network
from support.vllm_recordings import ask, read_recording, write_recording

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.engine.kernels.backends import Choice
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.modeling.backbone import canvas_rows
from fimserver.engine.modeling.model import Model

TINY = SHIPPED_MODELS / "tiny"
VARIABLES = {
    "tiny": "FIMSERVER_TEST_VLLM",
    "experts": "FIMSERVER_TEST_VLLM_EXPERTS",
    "nvfp4_experts": "FIMSERVER_TEST_VLLM_NVFP4_EXPERTS",
    "nvfp4_everything": "FIMSERVER_TEST_VLLM_NVFP4_EVERYTHING",
}
TEST = "tests/engine/remote/test_vllm_model.py"
TOLERANCE = 1e-3  # seen: 5e-5
NUM_RECORDED = 5  # tokens of a position
MOST_TOKENS = 20  # of a position that vLLM reports
METADATA = replace(read_metadata(TINY), name="experts", max_prompt_tokens=256, commit_probability=0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """A first step: which model, the lengths of prompt and canvas."""

    model: str
    num_prompt: int
    num_canvas: int
    slides: bool = False  # the window hides parts of the prompt

    @property
    def name(self) -> str:
        return f"first_step_{self.model}_{self.num_prompt}"

    @property
    def is_quantized(self) -> bool:
        return self.model.startswith("nvfp4")


STEPS = [
    Step("tiny", 300, 32),
    Step("experts", 16, 16),  # prompt and canvas fit the window of 32
    Step("experts", 64, 16, slides=True),
    Step("nvfp4_experts", 16, 16),
    Step("nvfp4_everything", 16, 16),
    Step("nvfp4_everything", 64, 16, slides=True),
]


@dataclass(frozen=True, slots=True)
class Read:
    """What vLLM reports of a first step: the best token and log-probabilities by token, for each position."""

    prompt: list[int]
    canvas: list[int]
    best: list[int]
    top: list[dict[int, float]]


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is compared, and the checksum of the weights that vLLM serves."""

    model: Model
    weights: str


@pytest.fixture(scope="module")
def tiny(tiny_model: Model) -> Served:
    return Served(tiny_model, digest(tiny_model.reference))


@pytest.fixture(scope="module")
def experts() -> Served:
    network = make_served_network()
    return Served(Model(network, METADATA), digest(network))


@pytest.fixture(scope="module")
def nvfp4_experts(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return load_quantized(tmp_path_factory.mktemp("nvfp4") / "experts", everything=False)


@pytest.fixture(scope="module")
def nvfp4_everything(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return load_quantized(tmp_path_factory.mktemp("nvfp4") / "everything", everything=True)


def load_quantized(folder: Path, *, everything: bool) -> Served:
    """Quantize the random network, and load the files as the engine does on a CPU."""
    save_quantized_network(folder, everything=everything)
    network = load_weights(folder, dtype=torch.float32, for_inference=True)
    return Served(Model(network, METADATA), digest_of(expand_nvfp4(folder)))


@pytest.fixture(params=STEPS, ids=[step.name for step in STEPS])
def step(request: pytest.FixtureRequest) -> Step:
    found: Step = request.param
    return found


@pytest.fixture
def served(step: Step, request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue(step.model)
    return found


def test_a_first_step_is_that_of_vllm(step: Step, served: Served) -> None:
    recording = read_recording(step.name)
    if recording["weights"] != served.weights:
        again = f"what was recorded is of other weights of the model {step.model}; record it again (see the docstring)"
        # The quantizer's results are the same on every machine, so a difference is a change of the format, or a fault.
        (pytest.fail if step.is_quantized else pytest.skip)(again)
    top = [dict(one) for one in recording["top"]]
    compare(step, served.model, Read(recording["prompt"], recording["canvas"], recording["best"], top))


@pytest.mark.slow("runs kernels in Triton's interpreter")
@pytest.mark.parametrize("step", [step for step in STEPS if step.is_quantized], ids=lambda step: step.name)
def test_kernels_compute_the_first_step_of_vllm(step: Step, tmp_path: Path) -> None:
    """The weights stay in 4 bits, as on a GPU, and Triton's kernels multiply by them, in float32."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install '.[interop]'")
    from fimserver.engine.kernels.triton_kernels import TritonMatmul

    folder = tmp_path / "model"
    save_quantized_network(folder, everything=step.model == "nvfp4_everything")
    network = load_weights(folder, dtype=torch.float32, keeps_nvfp4=True, for_inference=True)
    choice = Choice(TritonMatmul(dtype=torch.float32, exact=True))
    recording = read_recording(step.name)
    top = [dict(one) for one in recording["top"]]
    compare(
        step, Model(network, METADATA, choice), Read(recording["prompt"], recording["canvas"], recording["best"], top)
    )


@pytest.mark.slow("a real vLLM server takes seconds for an answer")
def test_a_first_step_is_that_of_a_real_server(step: Step, served: Served, request: pytest.FixtureRequest) -> None:
    variable = VARIABLES[step.model]
    url = os.environ.get(variable, "")
    if not url:
        pytest.skip(f"{variable} is not the address of a vLLM server with this model")
    found = read(step, url)
    if request.config.getoption("--update"):
        best_of = [sorted(one.items(), key=lambda pair: -pair[1])[:NUM_RECORDED] for one in found.top]
        fields = {
            "weights": served.weights,
            "prompt": found.prompt,
            "canvas": found.canvas,
            "best": found.best,
            "top": [[[i, round(v, 6)] for i, v in one] for one in best_of],
        }
        write_recording(step.name, url, f"{variable}={{url}} python -m pytest {TEST} --update", fields)
    compare(step, served.model, found)


def compare(step: Step, model: Model, found: Read) -> None:
    log_probabilities = compute(step, model, found)
    assert log_probabilities.argmax(dim=-1).tolist() == found.best
    assert len(found.top) == step.num_canvas
    for own, top in zip(log_probabilities, found.top, strict=True):
        assert len(top) >= NUM_RECORDED
        assert own[list(top)].tolist() == pytest.approx(list(top.values()), abs=TOLERANCE)


def compute(step: Step, model: Model, found: Read) -> torch.Tensor:
    """Return the model's own log-probabilities (C, V)."""
    cache = model.new_cache()
    model.encode(found.prompt, cache)
    canvas = torch.tensor([found.canvas])
    if not step.slides:
        return model.decode(canvas, cache, None)[0].log_softmax(dim=-1)
    rows = canvas_rows(canvas, cache.length)
    hidden = model.forward_rows(replace(rows, origins=rows.positions), cache)
    return model.to_logits(hidden).log_softmax(dim=-1)


def read(step: Step, url: str) -> Read:
    """Ask a server for the first step of a prompt and a canvas of random tokens."""
    chance = random.Random(step.num_prompt)
    prompt = [2, *(chance.randrange(8, 8192) for _ in range(step.num_prompt - 1))]
    canvas = [chance.randrange(8, 8192) for _ in range(step.num_canvas)]
    fields = {
        "diffusion_canvas_length": len(canvas),
        "diffusion_seed_canvas": canvas,
        "diffusion_max_steps": 1,
        "diffusion_read_only": True,
    }
    body = {
        "model": json.loads(ask(url, "GET", "/v1/models")[1])["data"][0]["id"],
        "prompt": prompt,
        "max_tokens": len(canvas),
        "logprobs": MOST_TOKENS,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # several tokens may have the same text
        "vllm_xargs": fields,
    }
    status, answer = ask(url, "POST", "/v1/completions", body)
    assert status == 200, answer
    choice = json.loads(answer)["choices"][0]
    top = [{int(k.partition(":")[2]): v for k, v in one.items()} for one in choice["logprobs"]["top_logprobs"]]
    return Read(prompt, canvas, choice["token_ids"], top)
