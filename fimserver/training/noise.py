"""Draw the noisy canvases that training denoises.

    first_noise    of a first pass: random tokens only, as decoding begins, or in place of some of the truth
    later_noise    of the second pass, which is conditioned on the first: the tokens that decoding keeps (its most
                   confident ones, right or wrong), the truth up to some position, or some of the truth; new random
                   tokens elsewhere

Where truth is kept, self-conditioning has to contain it: in decoding, every kept token has been predicted, and a model
trained without that learns to trust neither. So the condition is moved to the token there (``known``).
Noise is uniform over the vocabulary's text tokens.

Knows:  tensors, shares.  Never: the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fimserver.engine.decoding.denoise import accept_tokens
from fimserver.training.recipe import Recipe


def first_noise(truth: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator) -> Tensor:
    """Return canvases (B, K, C) for a first pass; noise is drawn from ``tokens`` (first, end)."""
    batch, canvases, _ = truth.shape
    share = torch.rand(batch, canvases, 1, generator=draws)
    share[torch.rand(batch, canvases, 1, generator=draws) < recipe.pure_noise] = 1.0
    return _replace(truth, share, tokens, draws)


@dataclass(frozen=True, slots=True)
class Later:
    """Canvases (B, K, C), and how far the condition of each token is moved to the token itself, 0 to 1."""

    canvases: Tensor
    known: Tensor


def later_noise(  # noqa: PLR0913, PLR0917  the inputs of decoding
    truth: Tensor, best: Tensor, entropy: Tensor, recipe: Recipe, tokens: tuple[int, int], draws: torch.Generator
) -> Later:
    """Return canvases for the second pass, from the first's tokens ``best`` and their ``entropy`` (B, K, C)."""
    batch, canvases, canvas = truth.shape
    low, high = recipe.least_bound, max(recipe.least_bound, recipe.largest_bound)
    bound = low * (high / low) ** torch.rand(batch, canvases, 1, generator=draws)
    kind = torch.rand(batch, canvases, 1, generator=draws)
    share = torch.rand(batch, canvases, 1, generator=draws)
    random = torch.randint(*tokens, truth.shape, generator=draws).to(truth.device)
    by_decoding = (kind < recipe.decoding_noise).to(truth.device)
    up_to = torch.arange(canvas) < share.pow(3) * canvas  # mostly near the beginning, as middles are short
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
