"""Cross-entropy of softcapped logits over a large vocabulary, a few rows at a time.

The logits of a step are its largest values (positions times vocabulary), and reading them back costs more than the
products. So a chunk of rows is multiplied, its loss and the gradient of its logits are made in one elementwise pass
while it is in the cache, and nothing of it is kept: the gradients of hidden states and embedding are ready when the
forward pass ends. Softcapped logits are at most ``CAP``, so their exponents need no maximum.

Knows:  tensors.  Never: tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CAP = 30.0  # of the class: final_logit_softcapping
_CHUNK_ROWS = 512


def softcap(logits: Tensor) -> Tensor:
    """Logits as the class gives them, fp32."""
    return torch.tanh(logits.float() / CAP) * CAP


def reference_loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The same by torch: hidden (N, H), embedding (V, H), targets (N,), weights (N,) -> scalar."""
    logits = softcap(hidden @ embedding.to(hidden.dtype).mT)
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


def logit_gradients(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,), and the gradient of its weighted loss by the logits (N, V) in their own dtype."""
    t = 1 - 2 / (torch.exp(logits.float() * (2 / CAP)) + 1)  # tanh, which costs twice as much by its own name
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
    """Sum of weighted losses, and the loss of each row (N,) without gradient; a row without weight costs nothing."""
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
        for rows in _chunks(weights):  # one shape for all chunks, or each would be compiled
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
    """Indexes of rows with a weight, the last chunk filled up with the index behind the last row."""
    rows = weights.nonzero()[:, 0]
    padded = rows.new_full((-(-len(rows) // _CHUNK_ROWS) * _CHUNK_ROWS,), len(weights))
    padded[: len(rows)] = rows
    return torch.split(padded, _CHUNK_ROWS)
