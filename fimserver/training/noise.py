"""What stands in a canvas that is to be denoised.

    first_noise    of a first pass: random tokens alone, as decoding begins, or in place of some of the truth
    later_noise    of the next one, which is conditioned on the first: what decoding keeps of it (its surest tokens,
                   right or wrong), the truth up to some place, or some of the truth; new random tokens elsewhere

Where truth is kept, the condition has to say so: decoding never meets a token that its condition knows nothing of,
and who is trained on such learns to believe neither. So there the condition is moved to the token (``known``).
Noise is uniform over the vocabulary's text tokens.

Knows:  tensors, shares.  Never: the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fimserver.engine.decoding.denoise import accept_tokens
from fimserver.training.recipe import Recipe


def first_noise(truth: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator) -> Tensor:
    """Canvases (B, K, C) for a first pass; noise is drawn from ``tokens`` (first, end)."""
    batch, canvases, _ = truth.shape
    share = torch.rand(batch, canvases, 1, generator=draws)
    share[torch.rand(batch, canvases, 1, generator=draws) < recipe.pure_noise] = 1.0
    return _replace(truth, share, tokens, draws)


@dataclass(frozen=True, slots=True)
class Later:
    """Canvases (B, K, C), and how far the condition of each token is moved to the token itself, 0 to 1."""

    canvases: Tensor
    known: Tensor


def later_noise(  # noqa: PLR0913, PLR0917  all that decoding knows
    truth: Tensor, best: Tensor, entropy: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator
) -> Later:
    """Canvases for the pass behind one that found ``best`` (B, K, C) likeliest, with ``entropy`` (B, K, C)."""
    batch, canvases, canvas = truth.shape
    low, high = recipe.least_bound, max(recipe.least_bound, recipe.largest_bound)
    bound = low * (high / low) ** torch.rand(batch, canvases, 1, generator=draws)
    kind = torch.rand(batch, canvases, 1, generator=draws)
    share = torch.rand(batch, canvases, 1, generator=draws)
    random = torch.randint(*tokens, truth.shape, generator=draws).to(truth.device)
    by_decoding = (kind < recipe.decoding_noise).to(truth.device)
    up_to = torch.arange(canvas) < share.pow(3) * canvas  # mostly near its beginning, as middles are short
    some = torch.rand(truth.shape, generator=draws) >= share
    kept_truth = torch.where(kind < recipe.decoding_noise + recipe.left_noise, up_to, some).to(truth.device)
    kept_best = accept_tokens(entropy.cpu(), bound).to(truth.device)
    kept = torch.where(by_decoding, kept_best, kept_truth)
    sureness = 0.5 + 0.5 * torch.rand(batch, canvases, 1, generator=draws).to(truth.device)
    found = torch.where(kept, torch.where(by_decoding, best, truth), random)
    return Later(found, torch.where(kept & ~by_decoding, sureness, 0.0))


def _replace(truth: Tensor, share: Tensor, tokens: tuple[int, int], draws: torch.Generator) -> Tensor:
    hit = torch.rand(truth.shape, generator=draws) < share
    random = torch.randint(*tokens, truth.shape, generator=draws)
    return torch.where(hit.to(truth.device), random.to(truth.device), truth)
