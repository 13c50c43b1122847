"""Compute the cross-entropy of softcapped logits over a large vocabulary, a few rows at a time.

The logits of a step are its largest values (positions times vocabulary), and reading them back costs more than the
matrix products. So each chunk of rows is multiplied, one elementwise pass computes its loss and the gradient of its
logits while they are in the cache, and none of it is kept: the gradients of hidden states and embedding are ready when
the forward pass ends. Softcapped logits are at most ``CAP``, so their exponents need no maximum.

Knows:  tensors.  Never: tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CAP = 30.0  # final_logit_softcapping of the class
_CHUNK_ROWS = 512


def softcap(logits: Tensor) -> Tensor:
    """Return the class's softcapped logits, fp32."""
    return torch.tanh(logits.float() / CAP) * CAP


def reference_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Compute the reference with torch: hidden (N, H), embedding (V, H), targets (N,), weights (N,) -> scalar."""
    logits = softcap(hidden @ embedding.to(hidden.dtype).mT)
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


def logit_gradients(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row (N,), and its weighted loss's gradient by the logits (N, V), in their dtype."""
    t = 1 - 2 / (torch.exp(logits.float() * (2 / CAP)) + 1)  # equals tanh, at half its cost
    e = torch.exp(t * CAP - CAP)
    total = e.sum(-1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    losses = total.log()[:, 0] + CAP - CAP * torch.where(hit, t, 0.0).sum(-1)
    gradient = (e / total - hit.float()) * (1 - t * t) * weights[:, None]
    return losses, gradient.to(logits.dtype)


def head_loss(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor,
    gradients: Callable[..., tuple[Tensor, Tensor]] = logit_gradients,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of losses, and each row's loss (N,) without gradient; skip rows of weight 0."""
    return _HeadLoss.apply(hidden, embedding, targets, weights, gradients)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  a loss and what it needs
        ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, gradients: Any
    ) -> tuple[Tensor, Tensor]:
        head = embedding.to(hidden.dtype)
        count = len(hidden)
        losses = torch.zeros(count + 1, device=hidden.device)
        d_hidden = torch.zeros(count + 1, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        d_embedding = torch.zeros_like(embedding)
        for rows in _chunks(weights):  # all of one shape, to compile only once
            real = rows.clamp(max=count - 1)
            scale = torch.where(rows < count, weights[real], 0.0)
            losses[rows], d_logits = gradients(hidden[real] @ head.mT, targets[real], scale)
            d_hidden[rows] = d_logits @ head
            d_embedding += d_logits.mT @ hidden[real]
        losses = losses[:-1]
        ctx.save_for_backward(d_hidden[:-1], d_embedding)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_embedding = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_embedding * grad, None, None, None


def _chunks(weights: Tensor) -> tuple[Tensor, ...]:
    """Return indexes of rows with a weight, in chunks; the last is padded with the index after the last row."""
    rows = weights.nonzero()[:, 0]
    padded = rows.new_full((-(-len(rows) // _CHUNK_ROWS) * _CHUNK_ROWS,), len(weights))
    padded[: len(rows)] = rows
    return torch.split(padded, _CHUNK_ROWS)
