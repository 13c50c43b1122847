"""Measure a model in training on held-out rows.

Knows:  tensors, rows.  Never: files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fimserver.checkpoints.metadata import ModelMetadata
from fimserver.engine.vocabulary import Vocabulary
from fimserver.training.loss import softcap
from fimserver.training.noise import first_noise, later_noise
from fimserver.training.packed_forward import PackedModel
from fimserver.training.recipe import Recipe
from fimserver.training.rows import Row

_DRAW_SEED = 11
_ROWS_AT_ONCE = 2
_SAMPLES = 4
_TEMPERATURE = 0.8  # of a first step
_AS_DECODED = Recipe(pure_noise=1.0, decoding_noise=1.0, least_bound=1.0, largest_bound=4.0)
_HALF_KNOWN = Recipe(decoding_noise=0.0, left_noise=1.0)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Losses in nats per token: of every next token, of the middle autoregressively, and of its denoising.

    ``held_denoise`` is from pure noise in one pass, ``held_denoise_later`` in the second pass, as in decoding.
    ``right`` and ``right_denoised`` are shares of the middle's tokens that are the likeliest, the latter after both
    passes. ``drafted`` is how many leading tokens of the first pass are right, ``drafted_own`` how many equal the
    autoregressive answer. ``held_first_denoised`` is the denoiser's loss of the first token after a middle's known
    beginning, ``held_first_autoregressive`` the autoregressive loss at the same positions. ``bits_per_character``
    is the loss of every next token divided by the text's length.
    """

    held_next_token: float
    held_middle: float
    held_denoise: float
    held_denoise_later: float
    right: float
    right_denoised: float
    drafted: float
    drafted_own: float
    bits_per_character: float
    held_first_denoised: float
    held_first_autoregressive: float


@torch.no_grad()
def measure(
    packed: PackedModel, rows: Sequence[Row], metadata: ModelMetadata, vocabulary: Vocabulary, tokens: tuple[int, int]
) -> tuple[HeldOut, list[str]]:
    """Return means over all rows, with the same noise each time, and samples of middles with their denoised text."""
    draws = torch.Generator().manual_seed(_DRAW_SEED)
    special = metadata.special_tokens
    sums = dict.fromkeys(
        (
            "next",
            "all",
            "middle",
            "first",
            "later",
            "right",
            "later_right",
            "run",
            "own",
            "tokens",
            "text",
            "on",
            "beside",
            "cuts",
        ),
        0.0,
    )
    samples: list[str] = []
    device = packed.embedding.device
    for begin in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[begin : begin + _ROWS_AT_ONCE]
        clean = torch.stack([r.clean for r in part]).to(device)
        truth = torch.stack([r.canvases[:1] for r in part]).to(device)  # the first canvas starts the middle
        starts = torch.stack([r.starts[:1] for r in part]).to(device)
        read = packed.read(clean, first_noise(truth, _AS_DECODED, tokens, draws), starts)
        self_conditioning, best, entropy = packed.predict(read.canvases.flatten(0, 1), _TEMPERATURE)
        found = (best.view(truth.shape), entropy.view(truth.shape))
        self_conditioning = self_conditioning.view(read.canvases.shape)
        drawn = later_noise(truth, *found, _AS_DECODED, tokens, draws)
        again = packed.read(None, drawn.canvases, starts, self_conditioning, read.known)
        drawn = later_noise(truth, *found, _HALF_KNOWN, tokens, draws)
        half = packed.read(None, drawn.canvases, starts, packed.condition(self_conditioning, drawn), read.known)
        assert read.clean is not None
        for i in range(len(part)):
            text = clean[i][clean[i] != special["pad"]]
            next_losses, next_right = _judge(packed, read.clean[i, : len(text) - 1], text[1:])
            own = packed.likeliest(read.clean[i, : len(text) - 1])
            answer = truth[i, 0][truth[i, 0] != special["pad"]]
            count, place = len(answer), int(starts[i, 0]) - 1
            losses, right = _judge(packed, read.canvases[i, :count], answer)
            later_losses, later_right = _judge(packed, again.canvases[i, :count], answer)
            sums["next"] += next_losses.sum().item()
            sums["all"] += len(next_losses)
            sums["middle"] += next_losses[place : place + count].sum().item()
            sums["right"] += next_right[place : place + count].sum().item()
            cut = int((drawn.known[i, 0] > 0).sum())
            if cut < count:
                sums["on"] += _judge(packed, half.canvases[i, cut : cut + 1], answer[cut : cut + 1])[0].item()
                sums["beside"] += next_losses[place + cut].item()
                sums["cuts"] += 1
            sums["first"] += losses.sum().item()
            sums["later"] += later_losses.sum().item()
            sums["later_right"] += later_right.sum().item()
            drafted = best.view(truth.shape)[i, 0, :count] == own[place : place + count]
            # up to the first token that differs from the text read
            as_read = torch.cat((drafted.new_ones(1), next_right[place : place + count - 1]))
            sums["own"] += (drafted & as_read).long().cumprod(0).sum().item()
            sums["text"] += len(vocabulary.decode(text.tolist()))
            sums["run"] += right.long().cumprod(0).sum().item()
            sums["tokens"] += count
            if len(samples) < _SAMPLES:
                one, two = best.view(truth.shape)[i, 0], packed.likeliest(again.canvases[i])
                samples.append(
                    " | ".join(repr(vocabulary.decode(_until_end(t, special["eos"]))) for t in (answer, one, two))
                )
    n = sums["tokens"]
    held_out = HeldOut(
        held_next_token=sums["next"] / sums["all"],
        held_middle=sums["middle"] / n,
        held_denoise=sums["first"] / n,
        held_denoise_later=sums["later"] / n,
        right=sums["right"] / n,
        right_denoised=sums["later_right"] / n,
        drafted=sums["run"] / len(rows),
        drafted_own=sums["own"] / len(rows),
        held_first_denoised=sums["on"] / max(1, sums["cuts"]),
        held_first_autoregressive=sums["beside"] / max(1, sums["cuts"]),
        bits_per_character=sums["next"] / math.log(2) / sums["text"],
    )
    return HeldOut(**{f: round(getattr(held_out, f), 4) for f in HeldOut.__slots__}), samples


def _judge(packed: PackedModel, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and whether it is the likeliest."""
    logits = softcap(hidden.to(packed.dtype) @ packed.embedding.to(packed.dtype).mT)
    return torch.nn.functional.cross_entropy(logits, tokens, reduction="none"), logits.argmax(-1) == tokens


def _until_end(tokens: Tensor, end: int) -> list[int]:
    ids: list[int] = tokens.tolist()
    return ids[: ids.index(end)] if end in ids else ids
