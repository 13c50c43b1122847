"""What stands in a canvas that is to be denoised.

    first_noise    of a first pass: random tokens alone, as decoding begins, or in place of some of the truth
    later_noise    of the next one: what decoding keeps of the first (its surest tokens, right or wrong) among new
                   random tokens, or again some of the truth

Decoding never meets the second kind of either: it is there because it teaches faster what a canvas is, and for drafts
that are mostly right. Noise is uniform over the vocabulary's text tokens.

Knows:  tensors, shares.  Never: the model.
"""

import torch
from torch import Tensor

from fimserver.training.recipe import Recipe


def first_noise(truth: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator) -> Tensor:
    """Canvases (B, K, C) for a first pass; noise is drawn from ``tokens`` (first, end)."""
    batch, canvases, _ = truth.shape
    share = torch.rand(batch, canvases, 1, generator=draws)
    share[torch.rand(batch, canvases, 1, generator=draws) < recipe.pure_noise] = 1.0
    return _replace(truth, share, tokens, draws)


def later_noise(  # noqa: PLR0913, PLR0917  all that decoding knows
    truth: Tensor, best: Tensor, entropy: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator
) -> Tensor:
    """Canvases for the pass behind one that found ``best`` (B, K, C) likeliest, with ``entropy`` (B, K, C)."""
    batch, canvases, _ = truth.shape
    low, high = recipe.least_bound, max(recipe.least_bound, recipe.largest_bound)
    bound = low * (high / low) ** torch.rand(batch, canvases, 1, generator=draws)
    kept = keep_by_entropy(entropy.cpu(), bound).to(truth.device)
    random = torch.randint(*tokens, truth.shape, generator=draws).to(truth.device)
    decoded = torch.where(kept, best, random)
    mixed = _replace(truth, torch.rand(batch, canvases, 1, generator=draws), tokens, draws)
    by_decoding = torch.rand(batch, canvases, 1, generator=draws) < recipe.decoding_noise
    return torch.where(by_decoding.to(truth.device), decoded, mixed)


def keep_by_entropy(entropy: Tensor, bound: Tensor) -> Tensor:
    """The entropy-bound sampler's choice (transformers): the surest tokens, up to a sum of entropies."""
    ordered, order = entropy.sort(-1)
    accepted = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(accepted).scatter(-1, order, accepted)


def _replace(truth: Tensor, share: Tensor, tokens: tuple[int, int], draws: torch.Generator) -> Tensor:
    hit = torch.rand(truth.shape, generator=draws) < share
    random = torch.randint(*tokens, truth.shape, generator=draws)
    return torch.where(hit.to(truth.device), random.to(truth.device), truth)
