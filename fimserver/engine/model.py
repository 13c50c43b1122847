"""One DiffusionGemma on one device: the causal encoder and the bidirectional decoder, without text.

    encode   prompt tokens into a KV cache   -> next-token logits
    decode   a canvas over that cache        -> logits of every canvas position
    look     drafted tokens and canvases     -> hidden states; what is right is kept, the rest forgotten

Knows:   tensors, devices.  Never: text, prompts, stopping.
Shapes:  T prompt tokens, K canvases of C positions, V vocabulary, H hidden size; one prompt at a time.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from fimserver.cards import NO_CARD
from fimserver.engine.backends import Choice, choose_products, find_products
from fimserver.engine.expert_cache import Traffic, add_up
from fimserver.engine.graphs import FixedPasses, capture
from fimserver.engine.key_values import KeyValues
from fimserver.engine.layers import measured
from fimserver.engine.network import Network, Rows, canvas_rows, causal_rows
from fimserver.engine.packed import count_parameters, find_packed_experts, is_packed
from fimserver.engine.products import PLAIN
from fimserver.engine.weights import ModelMetadata, limit_context, load_weights, read_metadata
from fimserver.errors import EngineError, WeightsError
from fimserver.model_facts import Format, Role, read_folder
from fimserver.planner import count_experts_on_card, plan_on_card

_logger = logging.getLogger(__name__)
_RECORDED_LENGTHS = 16  # of canvases, a multiple of it


class Model:
    """The network and what its folder says of it."""

    def __init__(
        self,
        network: DiffusionGemmaForBlockDiffusion,
        metadata: ModelMetadata,
        choice: Choice | None = None,
        *,
        consumes: bool = False,
        record: Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]] | None = None,
    ) -> None:
        """``consumes`` empties ``network`` of its layers' weights; ``record`` makes passes of fixed shape."""
        self.network = network
        self.num_parameters = count_parameters(network)
        self.choice = choice or Choice(PLAIN)
        self._expert_caches = [m.cache for m in find_packed_experts(network) if m.cache is not None]
        self.forward = Network(network, self.choice.products, consumes=consumes)
        self._fixed = FixedPasses(self.forward, record) if record and self.forward.is_fixed else None
        self.metadata = metadata
        self.text_config = network.config.text_config
        self.canvas_length: int = network.config.canvas_length
        self.vocab_size: int = self.text_config.vocab_size
        self.device: torch.device = network.device

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        report: Callable[[int, int], None] = lambda _done, _total: None,
        context_tokens: int | None = None,
        *,
        fp4_activations: bool = False,
    ) -> "Model":
        """Model of a folder on ``device``: fp32 on CPU and MPS; on CUDA bf16, and what is in 4 bits stays so.

        Where a card cannot hold all experts, they are in main memory and as many of each layer on it as fit.
        ``report`` gets bytes read, and all there are; ``context_tokens`` limits prompts. ``fp4_activations`` tries
        kernels that round activations to 4 bits. Raises ``WeightsError``.
        """
        metadata = limit_context(read_metadata(folder), context_tokens)
        if device.type != "cuda":
            network = load_weights(folder, dtype=torch.float32, report=report)
            return cls(network.to(device), metadata)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels and recordings are made for the current one
        on_device = find_experts_on_device(folder, metadata.max_prompt_tokens, torch.cuda.mem_get_info(device)[0])
        network = load_weights(
            folder,
            dtype=torch.bfloat16,
            device=device,
            keeps_nvfp4=True,
            experts_on_device=on_device,
            report=report,
        )
        choice = None
        if is_packed(network):
            choice = choose_products(
                device,
                torch.bfloat16,
                find_products(network),
                fp4_activations=fp4_activations,
                sign=lambda: report(999, 1000),
            )
        return cls(network, metadata, choice, consumes=True, record=capture)

    @property
    def kernels(self) -> str:
        """What multiplies by weights in 4 bits, and what was found of every way to; nothing without a choice."""
        tried = ", ".join(f"{name}: {found}" for name, found in self.choice.tried.items())
        return f"{self.choice.products.name} ({tried})" if tried else ""

    @property
    def cut_multiple(self) -> int:
        """What lengths of canvases are rounded up to: each length of a recorded pass is recorded for itself."""
        return _RECORDED_LENGTHS if self._fixed is not None else 1

    def unrecorded(self) -> "Model":
        """The same model, whose passes are called kernel by kernel."""
        other = copy.copy(self)
        other._fixed = None  # noqa: SLF001  its own copy
        return other

    @property
    def expert_traffic(self) -> Traffic | None:
        """What passes have copied from main memory so far; ``None`` where all experts are on the device."""
        return add_up(self._expert_caches) if self._expert_caches else None

    def new_cache(self) -> KeyValues:
        """An empty KV cache."""
        return self.forward.new_cache()

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[int], cache: KeyValues) -> torch.Tensor:
        """Write ``token_ids`` behind what ``cache`` holds; logits after the last one, (1, V) float32."""
        return self.forward.to_logits(self._encode(token_ids, cache)[-1:])

    @torch.inference_mode()
    def encode_all(self, token_ids: Sequence[int], cache: KeyValues) -> torch.Tensor:
        """Like ``encode``; logits after each token, (T, V) float32."""
        return self.forward.to_logits(self._encode(token_ids, cache))

    @torch.inference_mode()
    def decode(
        self, canvases: torch.Tensor, cache: KeyValues, soft: torch.Tensor | None, *, first: int = 0
    ) -> torch.Tensor:
        """Denoise canvases (K, C) once, side by side over a cache, which stays as it is; logits (K, C, V) float32.

        ``soft`` (K * C, H), from ``Network.to_soft``, is the self-conditioning. Positions before ``first`` are settled:
        there are no logits of them.
        """
        with measured("decode"):
            if self._fixed is not None:
                hidden = self._fixed.run(canvases, cache, soft)
            else:
                hidden = self.forward.forward(canvas_rows(canvases, cache.length), cache, soft)
        count, length = canvases.shape
        opened = hidden.view(count, length, -1)[:, first:]
        return self.forward.to_logits(opened.flatten(0, 1)).view(count, length - first, -1)

    @torch.inference_mode()
    def look(self, rows: Rows, cache: KeyValues) -> torch.Tensor:
        """Hidden states (N, H) of any rows; ``cache.keep`` then keeps those that are right."""
        with measured("decode" if rows.num_canvas else "encode"):
            return self.forward.forward(rows, cache)

    @torch.inference_mode()
    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) float32 of hidden states (N, H)."""
        return self.forward.to_logits(hidden)

    def _encode(self, token_ids: Sequence[int], cache: KeyValues) -> torch.Tensor:
        with measured("encode"):
            hidden = self.forward.forward(causal_rows(token_ids, cache.length, self.device), cache)
        cache.keep(range(len(token_ids)))
        return hidden


def find_experts_on_device(folder: Path, context_tokens: int, free_bytes: int) -> int | None:
    """How many experts of each layer a card has room for beside all else, by the planner; ``None`` is all of them.

    Also where experts are not in 4 bits, and for a folder of which only ``load_weights`` can say what is wrong.
    Raises ``WeightsError`` where not even one fits.
    """
    try:
        checkpoint = read_folder(folder)
    except WeightsError:
        return None
    shape = checkpoint.shape
    context_tokens = min(context_tokens, shape.longest_context_tokens)
    plan = plan_on_card(checkpoint, NO_CARD, context_tokens)
    is_in_4_bits = all(part.format is Format.NVFP4 for part in checkpoint.parts if part.role is Role.EXPERTS)
    if plan.total_bytes <= free_bytes or not is_in_4_bits:
        return None
    found = count_experts_on_card(checkpoint, context_tokens, free_bytes)
    if found < 1:
        least = plan.total_bytes - checkpoint.bytes_of(Role.EXPERTS) * (shape.num_experts - 1) // shape.num_experts
        msg = (
            f"{folder.name} needs {least / 1e9:.1f} GB of a card even with experts in main memory "
            f"and {free_bytes / 1e9:.1f} GB are free; close what else uses the card, or see fimserver doctor --card"
        )
        raise WeightsError(msg)
    _logger.warning(
        "%d of %d experts of each layer fit on the card; the others are copied from main memory when they are needed, "
        "which is slower (fimserver doctor --card says how much)",
        found,
        shape.num_experts,
    )
    return found


def find_device(name: str) -> torch.device:
    """Device of a torch name; ``auto`` takes CUDA, then MPS, then the CPU. Raises ``EngineError``."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"device {name!r} is none of torch's names; use auto, cpu, cuda, cuda:N or mps"
        raise EngineError(msg) from error
    if device.type not in ("cpu", "cuda", "mps"):
        msg = f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps"
        raise EngineError(msg)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        msg = f"device {name!r}: torch sees {count} CUDA devices; use auto or cpu, or install CUDA torch"
        raise EngineError(msg)
    if device.type == "mps" and not torch.backends.mps.is_available():
        msg = "device 'mps': torch has no MPS on this machine; use auto or cpu"
        raise EngineError(msg)
    return device
