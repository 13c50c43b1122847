"""The forward pass, compared with vLLM's implementation of the same class, which shares no code with transformers'.

The tests compare the log-probabilities of the first denoising step of a canvas. vLLM 0.32 differs from transformers in
two ways, and fimserver follows transformers:

- vLLM has one scalar for each layer, and takes the encoder's. The models of these tests have the same in both passes.
- In a sliding layer, vLLM counts the window of a canvas position from that position. transformers counts it from the
  beginning of the canvas. A step with ``slides`` has a prompt where that matters, and is computed in vLLM's way.

The answers of a server are recorded, so that every run compares them. To compare with a running server, start vLLM with
the shipped model, and with the random network of many experts, each on its own port:

    vllm serve fimserver/models/tiny --max-model-len 768 --dtype float32 --diffusion-config '{"canvas_length":32}'
    PYTHONPATH=tests:. python -m support.random_network FOLDER
    vllm serve FOLDER --max-model-len 768 --dtype float32 --diffusion-config '{"canvas_length":16}'

Then set ``FIMSERVER_TEST_VLLM`` and ``FIMSERVER_TEST_VLLM_EXPERTS`` to their addresses; ``--update`` records again.
"""

import json
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from support.random_network import digest, make_served_network
from support.vllm_recordings import ask, read_recording, write_recording

from fimserver.checkpoints.known import SHIPPED_MODELS
from fimserver.checkpoints.metadata import read_metadata
from fimserver.engine.modeling.backbone import canvas_rows
from fimserver.engine.modeling.model import Model

TINY = SHIPPED_MODELS / "tiny"
TINY_URL = os.environ.get("FIMSERVER_TEST_VLLM", "")
EXPERTS_URL = os.environ.get("FIMSERVER_TEST_VLLM_EXPERTS", "")
TEST = "tests/engine/remote/test_vllm_model.py"
TOLERANCE = 1e-3  # seen: 5e-5
NUM_RECORDED = 5  # tokens of a position
MOST_TOKENS = 20  # of a position that vLLM reports


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


STEPS = [
    Step("tiny", 300, 32),
    Step("experts", 16, 16),  # prompt and canvas fit the window of 32
    Step("experts", 64, 16, slides=True),
]


@dataclass(frozen=True, slots=True)
class Read:
    """What vLLM reports of a first step: the best token and log-probabilities by token, for each position."""

    prompt: list[int]
    canvas: list[int]
    best: list[int]
    top: list[dict[int, float]]


@pytest.fixture(scope="module")
def experts_model() -> Model:
    metadata = replace(read_metadata(TINY), name="experts", max_prompt_tokens=256, commit_probability=0.0)
    return Model(make_served_network(), metadata)


@pytest.fixture(params=STEPS, ids=[step.name for step in STEPS])
def step(request: pytest.FixtureRequest) -> Step:
    found: Step = request.param
    return found


@pytest.fixture
def served(step: Step, request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue("tiny_model" if step.model == "tiny" else "experts_model")
    return found


def test_a_first_step_is_that_of_vllm(step: Step, served: Model) -> None:
    recording = read_recording(step.name)
    if recording["weights"] != digest(served.reference):
        pytest.skip(
            f"what was recorded is of other weights of the model {step.model}; record it again (see the docstring)"
        )
    top = [dict(one) for one in recording["top"]]
    compare(step, served, Read(recording["prompt"], recording["canvas"], recording["best"], top))


@pytest.mark.slow("a real vLLM server takes seconds for an answer")
def test_a_first_step_is_that_of_a_real_server(step: Step, served: Model, request: pytest.FixtureRequest) -> None:
    url = TINY_URL if step.model == "tiny" else EXPERTS_URL
    variable = "FIMSERVER_TEST_VLLM" if step.model == "tiny" else "FIMSERVER_TEST_VLLM_EXPERTS"
    if not url:
        pytest.skip(f"{variable} is not the address of a vLLM server with this model")
    found = read(step, url)
    if request.config.getoption("--update"):
        best_of = [sorted(one.items(), key=lambda pair: -pair[1])[:NUM_RECORDED] for one in found.top]
        fields = {
            "weights": digest(served.reference),
            "prompt": found.prompt,
            "canvas": found.canvas,
            "best": found.best,
            "top": [[[i, round(v, 6)] for i, v in one] for one in best_of],
        }
        write_recording(step.name, url, f"{variable}={{url}} python -m pytest {TEST} --update", fields)
    compare(step, served, found)


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
