"""Hold weights in 4 bits, as modules that replace transformers' own.

    put_weight        set a model's weight: a parameter, or for an NVFP4Tensor a module that holds it
    place_weight      move a weight to the device or to host memory
    tie_weight        share the decoder's weight with the encoder
    PackedLinear      replaces nn.Linear
    PackedExperts     replaces all experts of a layer, on the device or (``expert_cache.py``) in host memory

Their ``forward`` expands the weights at every call: the plain reference, slow, correct on any device. The backbones
take the tensors out of them and multiplies with kernels where available.

Shapes:  T tokens, H hidden size, E experts, I an expert's inner size, k experts per token.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from fimserver.engine.kernels.expert_cache import ExpertCache
from fimserver.engine.kernels.matmul import PLAIN
from fimserver.engine.kernels.nvfp4 import BLOCK, NVFP4Tensor
from fimserver.errors import WeightsError

_STACKS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class PackedLinear(nn.Module):
    """A projection (N, K) whose weights are NVFP4; its ``bias`` (N,), if it has one, is in floats."""

    def __init__(self, weight: NVFP4Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._weights: NVFP4Tensor | None = weight.with_row_scales()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def weights(self) -> NVFP4Tensor:
        """The weights, until they are released."""
        assert self._weights is not None
        return self._weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``x`` (..., K) to (..., N)."""
        product = PLAIN.linear(self.weights, x)
        return product if self.bias is None else product + self.bias

    def release_weights(self) -> None:
        """Drop the weights."""
        self._weights = None


class PackedExperts(nn.Module):
    """The experts of a layer: gate and up (E, 2 I, H), down (E, H, I); with a ``cache`` they are in host memory."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up: NVFP4Tensor | None = None
        self.down: NVFP4Tensor | None = None
        self.cache: ExpertCache | None = None

    def stay_on_host(self, num_slots: int, device: torch.device) -> None:
        """Keep all experts in host memory, with slots for ``num_slots`` of them on a device."""
        self.cache = ExpertCache(*self.stacks(), min(num_slots, self.num_experts), device)

    def stacks(self) -> tuple[NVFP4Tensor, NVFP4Tensor]:
        """Return both tensors of a loaded model."""
        assert self.gate_up is not None
        assert self.down is not None
        return self.gate_up, self.down

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run ``x`` (T, H) through the ``chosen`` experts (T, k), their results added by ``weights`` (T, k)."""
        if self.cache is not None:
            return self.cache.run(PLAIN, x, chosen, weights)
        return PLAIN.experts(*self.stacks(), x, chosen, weights)

    def release_weights(self) -> None:
        """Drop the weights."""
        self.gate_up = self.down = self.cache = None


def is_packed(*modules: nn.Module) -> bool:
    """Return whether any part of these modules is in 4 bits."""
    return any(isinstance(m, PackedLinear | PackedExperts) for module in modules for m in module.modules())


def find_packed_experts(model: nn.Module) -> list[PackedExperts]:
    """Return the 4-bit experts of each layer; those that encoder and decoder share once."""
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


def count_parameters(model: nn.Module) -> int:
    """Count a model's weights in any format; shared ones once."""
    packed = {id(m): m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)}
    count = sum(p.numel() for p in model.parameters())
    for module in packed.values():
        stacks = module.stacks() if isinstance(module, PackedExperts) else (module.weights,)
        count += sum(math.prod(stack.shape) for stack in stacks)
    return count


def put_weight(model: nn.Module, name: str, weight: torch.Tensor | NVFP4Tensor) -> None:
    """Set the weight of that name in a model without weights."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(weight, torch.Tensor):
        if leaf in owner._parameters:  # noqa: SLF001  as torch's own loading does
            owner._parameters[leaf] = nn.Parameter(weight, requires_grad=weight.is_floating_point())  # noqa: SLF001
        else:
            owner._buffers[leaf] = weight  # noqa: SLF001
    elif leaf in _STACKS:
        if not isinstance(owner, PackedExperts):
            owner = PackedExperts(weight.shape[0])
            _replace(model, owner_name, owner)
        setattr(owner, _STACKS[leaf], weight)
    elif isinstance(owner, nn.Linear):
        _replace(model, owner_name, PackedLinear(weight, owner.bias))
    else:
        msg = f"{name} is in 4 bits, which only projections and experts can be; use another checkpoint"
        raise WeightsError(msg)


def is_stack(name: str) -> bool:
    """Return whether a weight of this name holds all experts of a layer."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _STACKS and owner.endswith(".experts")


def count_stack_bytes(shape: Sequence[int]) -> int:
    """Return the memory of experts in 4 bits: half a byte per weight, a scale per 16, four bytes per row."""
    return math.prod(shape) // 2 + math.prod(shape) // BLOCK + 4 * math.prod(shape[:-1])


def place_weight(name: str, weight: torch.Tensor | NVFP4Tensor, device: torch.device) -> torch.Tensor | NVFP4Tensor:
    """Move a weight to the device; packed experts to main memory, pinned if a GPU copies from it.

    Pinned memory is allocated in powers of two, as ``checkpoints.memory.pinned_stack_bytes`` counts it.
    """
    if not (is_stack(name) and isinstance(weight, NVFP4Tensor)):
        return weight.to(device)
    whole = weight.with_row_scales()
    if device.type != "cuda":
        return whole
    scales = whole.scales.view(torch.uint8).pin_memory().view(torch.float8_e4m3fn)
    return NVFP4Tensor(whole.packed.pin_memory(), scales, whole.global_scale.pin_memory())


def tie_weight(model: nn.Module, name: str, source: str) -> None:
    """Share the weight of ``source`` under another name; if it is packed, share its module."""
    owner_name, _, leaf = name.rpartition(".")
    source_name, _, source_leaf = source.rpartition(".")
    source_owner = model.get_submodule(source_name)
    if isinstance(source_owner, PackedLinear | PackedExperts):
        _replace(model, owner_name, source_owner)
    elif not isinstance(owner := model.get_submodule(owner_name), PackedExperts):
        owner._parameters[leaf] = source_owner._parameters[source_leaf]  # noqa: SLF001


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def find_packed_projections(model: Any) -> Iterator[tuple[int, int]]:
    """Yield each distinct shape (N, K) of the 4-bit projections of transformers' model, joined as in the backbones."""
    decoder = getattr(model.model, "decoder", model.model)  # a model without an encoder is its own decoder
    owners = [layer.mlp for layer in decoder.layers]
    if hasattr(decoder, "self_conditioning"):
        owners.insert(0, decoder.self_conditioning)
    groups = [group for owner in owners for group in ((owner.gate_proj, owner.up_proj), (owner.down_proj,))]
    for layer in decoder.layers:
        own = layer.self_attn
        groups += [tuple(p for p in (own.q_proj, own.k_proj, own.v_proj) if p is not None), (own.o_proj,)]
    seen = set()
    for group in groups:
        for packed, run in groupby(group, key=lambda m: isinstance(m, PackedLinear)):
            members = list(run)
            shape = (sum(num_rows_of(m) for m in members), members[0].weights.shape[1]) if packed else None
            if shape is not None and shape not in seen:
                seen.add(shape)
                yield shape


def num_rows_of(module: Any) -> int:
    """Return the number of output rows of a projection, packed or not."""
    weights = module.weights if isinstance(module, PackedLinear) else module.weight
    return int(weights.shape[0])
