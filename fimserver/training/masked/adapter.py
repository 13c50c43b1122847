"""Adapt a causal fill-in-the-middle model to masked diffusion: ``python -m fimserver.training.masked.adapter``.

    add_low_rank   every linear layer of the blocks gets two narrow matrices whose product is added to it
    adapt          the narrow matrices and the mask's embedding learn to fill canvases whose tokens see all others
    write_model    the sum as a model folder, which the engine loads

All else stays as it was, so an hour on a CPU is enough for a model that says something. It serves to measure masked
decoding on text that means something, not as a model to work with: published models took thousands of GPU hours.

Knows:   weights, rows.  Never: requests.
Shapes:  B rows, N tokens, R rank.
Source:  low-rank updates, arXiv 2106.09685; masked diffusion from an autoregressive model, arXiv 2410.17891.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from fimserver.checkpoints.installed import find_model
from fimserver.checkpoints.metadata import METADATA_FILE, Canvas, read_metadata
from fimserver.engine.loading.weights import load_weights
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.paths import use_private_caches
from fimserver.training.corpus import default_folder, read_documents
from fimserver.training.masked.rows import IGNORED, MaskedRow, MaskedRowMaker

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_SCALE = 2.0  # of the product
_WARM_UP_STEPS, _LAST_RATE = 30, 0.05
_END_WEIGHT = 0.3  # end tokens are half of all targets, and easy
_SMOOTHING = 0.97
_CANVAS_LENGTH = 16  # of requests; training has 1 to 32


@dataclass(frozen=True, slots=True)
class Options:
    """The size of a run; it ends after ``minutes`` or ``steps``, whichever comes first."""

    minutes: float = 60.0
    steps: int = 1_000_000
    rows: int = 8
    length: int = 128
    rank: int = 32
    rate: float = 2e-4  # the highest learning rate
    seed: int = 0


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a trained product of two narrow matrices that is added to it."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (..., out_features)."""
        added = functional.linear(functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        out: Tensor = self.linear(x)
        return out + _SCALE * added

    def merged(self) -> Tensor:
        """Return the weight of one linear layer that does the same."""
        weight = self.linear.weight
        return (weight.float() + _SCALE * self.up.detach() @ self.down.detach()).to(weight.dtype)


def add_low_rank(network: Any, rank: int) -> list[nn.Parameter]:
    """Replace the linear layers of every block by ``LowRank``; return what is trained."""
    found: list[nn.Parameter] = []
    for block in network.model.layers:
        for part, names in ((block.self_attn, _ATTENTION), (block.mlp, _MLP)):
            for name in names:
                layer = LowRank(getattr(part, name), rank)
                setattr(part, name, layer)
                found += [layer.down, layer.up]
    return found


def adapt(
    network: Any,
    maker: MaskedRowMaker,
    options: Options,
    report: Callable[[int, float, float], None] = lambda _step, _loss, _right: None,
) -> None:
    """Train ``network`` in place, until the run is over or interrupted.

    ``report`` gets the step, the loss in nats a token and the share of right tokens, both smoothed and without end
    tokens.
    """
    torch.manual_seed(options.seed)
    network.requires_grad_(requires_grad=False)
    embedding = network.model.embed_tokens.weight
    of_mask = nn.Parameter(embedding[maker.mask].detach().float())
    parameters = [*add_low_rank(network, options.rank), of_mask]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)
    begin, smooth = time.monotonic(), (0.0, 0.0)
    with suppress(KeyboardInterrupt):  # Ctrl-C ends the run early
        for step in range(1, options.steps + 1):
            done = max((time.monotonic() - begin) / (60 * options.minutes), (step - 1) / options.steps)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = options.rate * min(1.0, step / _WARM_UP_STEPS) * (1 - (1 - _LAST_RATE) * done)
            losses, hits, is_text = _compute(network, maker, [maker.make() for _ in range(options.rows)], of_mask)
            weights = torch.where(is_text, 1.0, _END_WEIGHT)
            optimizer.zero_grad()
            ((losses * weights).sum() / weights.sum()).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if is_text.any():
                now = (float(losses.detach()[is_text].mean()), float(hits[is_text].float().mean()))
                kept = min(_SMOOTHING, 1 - 1 / step)
                smooth = (kept * smooth[0] + (1 - kept) * now[0], kept * smooth[1] + (1 - kept) * now[1])
            report(step, *smooth)
    with torch.no_grad():
        embedding[maker.mask] = of_mask.to(embedding.dtype)


def _compute(
    network: Any, maker: MaskedRowMaker, rows: Sequence[MaskedRow], of_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of every target (T,), whether it is the likeliest token, and whether it is no end token."""
    embedding = network.model.embed_tokens.weight
    token_ids, targets, sees = to_batch(rows, maker.end, embedding.dtype)
    inputs = functional.embedding(token_ids, embedding)
    inputs = torch.where((token_ids == maker.mask)[..., None], of_mask.to(inputs.dtype), inputs)
    hidden = network.model(inputs_embeds=inputs, attention_mask={"full_attention": sees}, use_cache=False)[0]
    asked = targets[:, 1:] != IGNORED
    logits, truth = network.lm_head(hidden[:, :-1][asked]).float(), targets[:, 1:][asked]
    losses = functional.cross_entropy(logits, truth, reduction="none")
    return losses, logits.argmax(-1) == truth, truth != maker.end


def to_batch(rows: Sequence[MaskedRow], pad: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids (B, N), targets (B, N) and the additive mask (B, 1, N, N) that hides padding."""
    longest = max(len(row.token_ids) for row in rows)
    token_ids = torch.full((len(rows), longest), pad)
    targets = torch.full((len(rows), longest), IGNORED)
    sees = torch.zeros(len(rows), 1, longest, longest, dtype=dtype)
    for number, row in enumerate(rows):
        count = len(row.token_ids)
        token_ids[number, :count] = torch.tensor(row.token_ids)
        targets[number, :count] = torch.tensor(row.targets)
        sees[number, :, :, count:] = float("-inf")
    return token_ids, targets, sees


def write_model(network: Any, source: Path, folder: Path, mask: int, end: int) -> None:
    """Write the adapted model with the source's tokenizer and a record that says what it is now."""
    merged = {f"{name}.weight": layer.merged() for name, layer in network.named_modules() if isinstance(layer, LowRank)}
    kept = {name.replace(".linear.", "."): weight for name, weight in network.state_dict().items()}
    weights = {name: weight for name, weight in (kept | merged).items() if not name.endswith((".down", ".up"))}
    if network.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    network.config.save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    known = read_metadata(source)
    record = {
        "name": folder.name, "prompt_layout": "infill", "special_tokens": {"eos": end, "mask": mask},
        "end_token_ids": [token_id for token_id in known.end_token_ids if token_id != mask],
        "num_special_tokens": known.num_special_tokens,
        "max_prompt_tokens": known.max_prompt_tokens, "usual_prompt_tokens": known.usual_prompt_tokens,
        "max_suffix_tokens": known.max_suffix_tokens, "preferred_mode": "diffusion", "attention": "bidirectional",
        "canvas": "mask", "canvas_length": _CANVAS_LENGTH, "logit_shift": 1, "length_rule": "end_token",
        "healing": known.healing, "languages": ["python"],
    }  # fmt: skip
    (folder / METADATA_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def adapt_folder(source: str, folder: Path, corpus: Path | None, options: Options) -> None:
    """Read a model and the corpus, train, and write the new model's folder. Raises ``FimserverError``."""
    found = find_model(source)
    known = read_metadata(found)
    special = known.special_tokens
    if known.canvas is not Canvas.NONE:
        msg = f"{source} is no autoregressive model; begin with one such as qwen2.5-coder-0.5b"
        raise FimserverError(msg)
    mask, end = special["middle"], special["eos"]
    texts = [document.text for document in read_documents(corpus or default_folder())]
    vocabulary = Vocabulary.load(found / "tokenizer.json", known.special_ids)
    maker = MaskedRowMaker(texts, vocabulary, mask, end, options.length, options.seed)
    network = load_weights(found, dtype=torch.bfloat16)
    console, begin = Console(stderr=True), time.monotonic()

    def report(step: int, loss: float, right: float) -> None:
        if step % 10 == 0:
            minutes = (time.monotonic() - begin) / 60
            console.print(f"{minutes:.1f} min  step {step}  loss {loss:.3f}  right {right:.3f}", soft_wrap=True)

    adapt(network, maker, options, report)
    write_model(network, found, folder, mask, end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapt a model from the command line: for those who measure masked decoding, not a command of users."""
    name = "python -m fimserver.training.masked.adapter"
    parser = argparse.ArgumentParser(prog=name, description=adapt_folder.__doc__)
    parser.add_argument("source", metavar="NAME|FOLDER", help="a Qwen2 model with tokens for fill-in-the-middle")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the new model is written")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="length of the run (60)")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="folder of the corpus")
    given = parser.parse_args(arguments)
    try:
        use_private_caches()
        adapt_folder(given.source, given.folder, given.corpus, Options(minutes=given.minutes))
    except FimserverError as error:
        print(f"fimserver: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
