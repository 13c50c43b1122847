"""Weights that stay in 4 bits, as modules in place of transformers' own.

    put_weight        a weight into a model: a parameter, or for an NVFP4Tensor a module that holds it
    place_weight      which of two memories a weight is for
    tie_weight        the encoder's weight is the decoder's
    PackedLinear      nn.Linear's place
    PackedExperts     the place of all experts of a layer, on the device or (``expert_cache.py``) in host memory

Their ``forward`` expands the weights at every call: the plain reference, slow, right on any device. ``network.py``
takes the tensors out of them and multiplies by kernels where there are some.

Shapes:  T tokens, H hidden size, E experts, I an expert's inner size, k experts a token.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from fimserver.engine.kernels.matmul import PLAIN
from fimserver.engine.kernels.nvfp4 import BLOCK, NVFP4Tensor
from fimserver.engine.modeling.expert_cache import ExpertCache
from fimserver.errors import WeightsError

_STACKS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class PackedLinear(nn.Module):
    """A projection (N, K) whose weights are NVFP4."""

    def __init__(self, weight: NVFP4Tensor) -> None:
        super().__init__()
        self._weights: NVFP4Tensor | None = weight.with_row_scales()

    @property
    def weights(self) -> NVFP4Tensor:
        """The tensor, until it is let go."""
        assert self._weights is not None
        return self._weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., K) to (..., N)."""
        return PLAIN.linear(self.weights, x)

    def release_weights(self) -> None:
        """Hold no weights any more."""
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
        """Leave all experts where they are, and have room for some of them on a device."""
        self.cache = ExpertCache(*self.stacks(), min(num_slots, self.num_experts), device)

    def stacks(self) -> tuple[NVFP4Tensor, NVFP4Tensor]:
        """Both tensors, which are there once the model is loaded."""
        assert self.gate_up is not None
        assert self.down is not None
        return self.gate_up, self.down

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``x`` (T, H) through the ``chosen`` experts (T, k), their results added by ``weights`` (T, k)."""
        if self.cache is not None:
            return self.cache.run(PLAIN, x, chosen, weights)
        return PLAIN.experts(*self.stacks(), x, chosen, weights)

    def release_weights(self) -> None:
        """Hold no weights any more."""
        self.gate_up = self.down = self.cache = None


def is_packed(*modules: nn.Module) -> bool:
    """Whether a part of these modules is in 4 bits."""
    return any(isinstance(m, PackedLinear | PackedExperts) for module in modules for m in module.modules())


def find_packed_experts(model: nn.Module) -> list[PackedExperts]:
    """The experts of each layer that are in 4 bits; those that encoder and decoder share once."""
    return [m for m in model.modules() if isinstance(m, PackedExperts)]


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, in whichever format; those that two parts share once."""
    packed = {id(m): m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)}
    count = sum(p.numel() for p in model.parameters())
    for module in packed.values():
        stacks = module.stacks() if isinstance(module, PackedExperts) else (module.weights,)
        count += sum(math.prod(stack.shape) for stack in stacks)
    return count


def put_weight(model: nn.Module, name: str, weight: torch.Tensor | NVFP4Tensor) -> None:
    """Make a tensor the weight of that name in a model whose own is not there yet."""
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
        _replace(model, owner_name, PackedLinear(weight))
    else:
        msg = f"{name} is in 4 bits, which only projections and experts can be; use another checkpoint"
        raise WeightsError(msg)


def is_stack(name: str) -> bool:
    """Whether a weight of this name is all experts of a layer."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _STACKS and owner.endswith(".experts")


def count_stack_bytes(shape: Sequence[int]) -> int:
    """Memory of experts in 4 bits: half a byte a weight, a scale for 16, four bytes a row."""
    return math.prod(shape) // 2 + math.prod(shape) // BLOCK + 4 * math.prod(shape[:-1])


def place_weight(name: str, weight: torch.Tensor | NVFP4Tensor, device: torch.device) -> torch.Tensor | NVFP4Tensor:
    """A weight on the device; packed experts in main memory, pinned where a card is to copy from it.

    Pinned memory comes in powers of two; ``checkpoints.memory.pinned_stack_bytes`` counts it so.
    """
    if not (is_stack(name) and isinstance(weight, NVFP4Tensor)):
        return weight.to(device)
    whole = weight.with_row_scales()
    if device.type != "cuda":
        return whole
    scales = whole.scales.view(torch.uint8).pin_memory().view(torch.float8_e4m3fn)
    return NVFP4Tensor(whole.packed.pin_memory(), scales, whole.global_scale.pin_memory())


def tie_weight(model: nn.Module, name: str, source: str) -> None:
    """Make the weight of one name that of another; where that is packed, its module."""
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
