"""Measure the inputs of a model's matrices over a text, which weigh the errors of quantization.

Knows:   the model in bf16, modules only to watch their inputs.  Never: files of weights.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fimserver.checkpoints.metadata import NO_TOKEN, Attention, Canvas, read_metadata
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.quantize.plan import DECODER, ENCODER, OTHERS
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError

Report = Callable[[str, int, int], None]
_WINDOW_TOKENS, _MOST_WINDOWS, _SEED = 512, 128, 0
_LEAST_IMPORTANCE = 1e-4  # fraction of the mean, so that the error of every column counts


def measure_inputs(
    folder: Path, text_file: Path, *, report: Report = lambda _what, _done, _total: None
) -> dict[str, torch.Tensor]:
    """Return the mean square (K,) of each matrix's input columns over a text, by the matrix's name.

    Runs the bf16 model over windows of the text. A model with canvases of noise also runs twice over a canvas after
    each window, the second time conditioned on the first. One number serves all experts of a layer: few of them see
    much of a text.
    """
    metadata = read_metadata(folder)
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        msg = f"the calibration text {text_file} cannot be read ({error}); give a file of UTF-8 text"
        raise FimserverError(msg) from error
    ids = Vocabulary.load(folder / "tokenizer.json", metadata.special_ids).encode(text)
    window = max(1, min(_WINDOW_TOKENS, metadata.max_prompt_tokens - 1))
    starts = list(range(0, len(ids), window))
    starts = starts[:: math.ceil(len(starts) / _MOST_WINDOWS) or 1]
    if not starts:
        msg = f"the calibration text {text_file} is empty; give some pages of typical input"
        raise FimserverError(msg)
    network = load_weights(folder, dtype=torch.bfloat16)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def add(name: str, rows: torch.Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        squares = rows.double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] += len(rows)

    for name, module in network.named_modules():
        own = name.replace(ENCODER, DECODER, 1)
        if own.endswith(".experts"):
            module.register_forward_pre_hook(_watch_experts(own, add))
        elif OTHERS.search(f".{own}.weight"):
            module.register_forward_pre_hook(_watch_linear(own, add))
    generator = torch.Generator().manual_seed(_SEED)
    for i, start in enumerate(starts):
        begin = metadata.special_tokens["bos"]
        prompt = torch.tensor([[*([] if begin == NO_TOKEN else [begin]), *ids[start : start + window]]])
        with torch.inference_mode():
            if metadata.canvas is Canvas.UNIFORM:
                _run_with_canvas(network, prompt, generator)
            else:
                is_causal = metadata.attention is Attention.CAUSAL
                network(
                    prompt, attention_mask=None if is_causal else torch.zeros(1, 1, *(prompt.shape[1],) * 2).bfloat16()
                )
        report("calibration", i + 1, len(starts))
    return {name: _to_importance(squares / counts[name]) for name, squares in sums.items()}


def _run_with_canvas(network: Any, prompt: torch.Tensor, generator: torch.Generator) -> None:
    canvas = torch.randint(
        network.config.text_config.vocab_size, (1, network.config.canvas_length), generator=generator
    )
    first = network(prompt, decoder_input_ids=canvas)
    network.model.decoder(
        decoder_input_ids=canvas,
        past_key_values=first.past_key_values,
        self_conditioning_logits=first.logits,
    )


def _watch_experts(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[Any, Any], None]:
    def watch(experts: Any, inputs: Any) -> None:
        x, chosen, _ = inputs
        add(f"{name}.gate_up_proj", x)
        for expert in chosen.unique().tolist():
            gate_up = torch.nn.functional.linear(x[(chosen == expert).any(-1)], experts.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            add(f"{name}.down_proj", experts.act_fn(gate) * up)

    return watch


def _watch_linear(name: str, add: Callable[[str, torch.Tensor], None]) -> Callable[[Any, Any], None]:
    return lambda _module, inputs: add(name, inputs[0])


def _to_importance(squares: torch.Tensor) -> torch.Tensor:
    mean = squares.mean()
    return (squares / mean).clamp_min(_LEAST_IMPORTANCE).float() if mean > 0 else torch.ones_like(squares).float()
