"""Run one model on one device, without text: prompts into a cache, rows and canvases over it.

    encode        prompt tokens into a KV cache   -> next-token logits
    decode        canvases over that cache        -> logits of every canvas position
    forward_rows  draft tokens and canvases       -> hidden states; the caller keeps the accepted rows

Knows:   tensors, devices.  Never: text, prompts, stopping.
Shapes:  T prompt tokens, K canvases of C positions, V vocabulary, H hidden size; one prompt at a time.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fimserver.checkpoints.engine_limits import CUT_MULTIPLE, LOGITS_COPIES, fixed_places
from fimserver.checkpoints.gpus import NO_GPU
from fimserver.checkpoints.memory import Format, Role, read_folder
from fimserver.checkpoints.metadata import Canvas, ModelMetadata, limit_context, read_metadata
from fimserver.checkpoints.planner import count_experts_on_gpu, plan_on_gpu
from fimserver.engine.kernels.backends import Choice, choose_matmul, find_matmul_work
from fimserver.engine.kernels.cpu_linear import CpuKernels, choose_float_dtype, choose_kernels
from fimserver.engine.kernels.devices import GraphRecorder, Record, free_bytes
from fimserver.engine.kernels.expert_cache import Traffic, add_up
from fimserver.engine.kernels.faults import SLOW_EXPERTS, find_device_fault
from fimserver.engine.kernels.matmul import PLAIN
from fimserver.engine.kernels.packed import count_parameters, find_packed_experts, is_packed
from fimserver.engine.loading.weights import is_dense_config, load_weights
from fimserver.engine.modeling.backbone import Backbone, Rows, canvas_rows, causal_rows
from fimserver.engine.modeling.diffusion_gemma import DiffusionGemma
from fimserver.engine.modeling.graphs import FixedPasses, GraphReport, error_without_graphs
from fimserver.engine.modeling.kv_cache import KVCache
from fimserver.engine.modeling.layers import measured
from fimserver.engine.modeling.qwen2 import Qwen2
from fimserver.errors import EngineError, WeightsError

_CANVAS_BYTES_WITHOUT_GPU = 3_000_000_000  # of canvases side by side, on a CPU
_SPARE_BYTES = 500_000_000  # of free GPU memory, left for what a request needs besides its canvases
_ANSWER_TOKENS = 32  # of a model without a canvas: the least room for an answer
_logger = logging.getLogger(__name__)


class Model:
    """The network and its folder's metadata."""

    def __init__(
        self,
        reference: Any,
        metadata: ModelMetadata,
        choice: Choice | None = None,
        *,
        consumes: bool = False,
        cpu_kernels: CpuKernels | None = None,
    ) -> None:
        """Build from ``reference``; ``consumes`` frees its layers' weights."""
        self.reference = reference
        self.num_parameters = count_parameters(reference)
        self.choice = choice or Choice(PLAIN)
        self._expert_caches = [m.cache for m in find_packed_experts(reference) if m.cache is not None]
        self.cpu_kernels = cpu_kernels or CpuKernels()
        self.network: Backbone
        if reference.config.model_type == "qwen2":
            self.network = Qwen2(reference, self.choice.matmul, consumes=consumes, cpu_kernels=self.cpu_kernels)
        else:
            self.network = DiffusionGemma(reference, self.choice.matmul, consumes=consumes)
        self.fixed: FixedPasses | None = None  # captured passes, if any
        self.metadata = metadata
        self.text_config = reference.config.get_text_config()
        self.canvas_length: int = metadata.canvas_length or getattr(reference.config, "canvas_length", _ANSWER_TOKENS)
        self.vocab_size: int = self.text_config.vocab_size
        self.device: torch.device = reference.device

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
        """Load a folder on ``device``; on CUDA in bf16, and 4-bit weights stay in 4 bits.

        On a CPU DiffusionGemma is in float32; Qwen2 is in bf16, with packed copies for passes over few rows.

        If a GPU cannot hold all experts, they stay in main memory and as many of each layer as fit are on the GPU.
        ``report`` gets bytes read and total bytes; ``context_tokens`` limits prompts. ``fp4_activations`` tries kernels
        that round activations to 4 bits. Raises ``WeightsError``.
        """
        metadata = limit_context(read_metadata(folder), context_tokens)
        if device.type != "cuda":
            return cls._load_without_cuda(folder, metadata, device, report)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels and CUDA graphs belong to the current device
        on_device = find_experts_on_device(folder, metadata.max_prompt_tokens, torch.cuda.mem_get_info(device)[0])
        network = load_weights(
            folder,
            dtype=torch.bfloat16,
            device=device,
            keeps_nvfp4=True,
            for_inference=True,
            experts_on_device=on_device,
            report=report,
        )
        choice = None
        if is_packed(network):
            choice = choose_matmul(
                device,
                torch.bfloat16,
                find_matmul_work(network),
                fp4_activations=fp4_activations,
                sign=lambda: report(999, 1000),
            )
        return cls(network, metadata, choice, consumes=True)

    @classmethod
    def _load_without_cuda(
        cls, folder: Path, metadata: ModelMetadata, device: torch.device, report: Callable[[int, int], None]
    ) -> "Model":
        is_dense = is_dense_config(folder)
        dtype = choose_float_dtype() if is_dense and device.type == "cpu" else torch.float32
        network = load_weights(folder, dtype=dtype, for_inference=True, report=report)
        if not (is_dense and device.type == "cpu"):
            return cls(network.to(device), metadata)
        layer = network.model.layers[0].mlp
        samples = [layer.gate_proj.weight.detach(), layer.down_proj.weight.detach()] if dtype is torch.bfloat16 else []
        kernels = choose_kernels(samples, sign=lambda: report(999, 1000)) if samples else CpuKernels()
        model = cls(network, metadata, consumes=True, cpu_kernels=kernels)
        if kernels.kernels:
            model.fit_kernels()
        return model

    @torch.inference_mode()
    def fit_kernels(self) -> None:
        """Measure up to how many rows a pass is faster with packed copies of the weights; takes a second."""
        cache = self.new_cache()

        def run(num_rows: int) -> torch.Tensor:
            return self.to_logits(self.forward_rows(causal_rows([0] * num_rows, 0, self.device), cache))

        self.cpu_kernels.fit_rows(run)

    @property
    def kernels(self) -> str:
        """Description of the matmul backend for 4-bit weights and of every one tried; empty without a choice."""
        if self.cpu_kernels.tried:
            tried = ", ".join(f"{name}: {found}" for name, found in self.cpu_kernels.tried.items())
            return f"{self.cpu_kernels.description} ({tried})"
        tried = ", ".join(f"{name}: {found}" for name, found in self.choice.tried.items())
        return f"{self.choice.matmul.name} ({tried})" if tried else ""

    def capture_passes(
        self,
        cache: KVCache,
        mode: str = "auto",
        *,
        record: Record | None = None,
        sign: Callable[[], None] = lambda: None,
    ) -> GraphReport:
        """Capture the denoising passes over ``cache`` as CUDA graphs, which must be the cache of all requests.

        ``mode`` is ``auto``, ``on`` (what prevents it is an ``EngineError``) or ``off``; ``record`` is a
        ``GraphRecorder`` by default, on a GPU alone. ``sign`` is called now and then.
        """
        if record is None and self.device.type == "cuda":
            record = GraphRecorder()
        if record is None or self.metadata.canvas is not Canvas.UNIFORM or self.metadata.denoises_from_left:
            return GraphReport(fault="only denoising steps on an NVIDIA GPU are captured")
        if mode == "off":
            return GraphReport(fault="turned off by cudaGraphs")
        if not self.network.is_fixed:
            fault = "the host reads which experts the tokens chose (experts in main memory, or kernels in plain torch)"
            if mode == "on":
                raise error_without_graphs(fault)
            return GraphReport(fault=fault)
        self.fixed = FixedPasses(self.network, cache)
        places = fixed_places(self.metadata.max_prompt_tokens, self.canvas_length)
        report = self.fixed.capture(record, self.canvas_length, places, is_needed=mode == "on", sign=sign)
        if report.fault:
            self.fixed = None
        return report

    @property
    def cut_multiple(self) -> int:
        """Multiple that lengths of canvases are rounded up to: few sizes of tensors on a GPU, the least on a CPU."""
        return CUT_MULTIPLE if self.fixed is not None or self.device.type == "cuda" else 1

    def max_canvas_rows(self, cache: KVCache) -> int:
        """Return how many rows canvases may have together: those of one canvas, and more where memory is free."""
        room = free_bytes(self.device)
        if room is None:
            room = _CANVAS_BYTES_WITHOUT_GPU
        elif self.fixed is not None:
            room -= self.fixed.report.num_bytes  # memory of graphs that is unused now, but theirs
        rows = (room - _SPARE_BYTES) // (self.vocab_size * (4 * LOGITS_COPIES + self.network.dtype.itemsize))
        if self.fixed is not None:
            rows = min(rows, cache.num_free_rows)  # buffers that grow move, and graphs are lost
        return max(self.canvas_length, rows)

    def without_graphs(self) -> "Model":
        """Return the same model without CUDA graphs."""
        other = copy.copy(self)
        other.fixed = None
        return other

    @property
    def expert_traffic(self) -> Traffic | None:
        """Return the traffic of experts from main memory so far; ``None`` if all experts are on the device."""
        return add_up(self._expert_caches) if self._expert_caches else None

    def new_cache(self) -> KVCache:
        """Create an empty KV cache."""
        return self.network.new_cache()

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Append ``token_ids`` to ``cache``; return the logits after the last one, (1, V) float32."""
        return self.network.to_logits(self._encode(token_ids, cache)[-1:])

    @torch.inference_mode()
    def encode_all(self, token_ids: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Append ``token_ids`` as ``encode`` does; return the logits after each token, (T, V) float32."""
        return self.network.to_logits(self._encode(token_ids, cache))

    @torch.inference_mode()
    def decode(
        self, canvases: torch.Tensor, cache: KVCache, self_conditioning: torch.Tensor | None, *, first: int = 0
    ) -> torch.Tensor:
        """Denoise canvases (K, C) once over a cache, which stays as it is; return logits (K, C, V) float32.

        ``self_conditioning`` (K * C, H) comes from ``Network.to_self_conditioning``. Positions before ``first`` are
        settled and get no logits.
        """
        with measured("decode"):
            hidden = None if self.fixed is None else self.fixed.run(canvases, cache, self_conditioning)
            if hidden is None:
                hidden = self.network.forward(canvas_rows(canvases, cache.length), cache, self_conditioning)
        count, length = canvases.shape
        opened = hidden.view(count, length, -1)[:, first:]
        return self.network.to_logits(opened.flatten(0, 1)).view(count, length - first, -1)

    @torch.inference_mode()
    def forward_rows(self, rows: Rows, cache: KVCache) -> torch.Tensor:
        """Return hidden states (N, H) of any rows; ``cache.keep`` then keeps the accepted ones."""
        with measured("decode" if rows.num_canvas else "encode"):
            return self.network.forward(rows, cache)

    @torch.inference_mode()
    def to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) float32 of hidden states (N, H)."""
        return self.network.to_logits(hidden)

    def _encode(self, token_ids: Sequence[int], cache: KVCache) -> torch.Tensor:
        with measured("encode"):
            hidden = self.network.forward(causal_rows(token_ids, cache.length, self.device), cache)
        cache.keep(range(len(token_ids)))
        return hidden


def find_experts_on_device(folder: Path, context_tokens: int, free_bytes: int) -> int | None:
    """Return how many experts of each layer fit on a GPU next to everything else, by the planner; ``None`` for all.

    Also ``None`` without experts, if they are not in 4 bits, and for a damaged folder, which ``load_weights`` reports.
    Raises ``WeightsError`` if not even one fits.
    """
    try:
        checkpoint = read_folder(folder)
    except WeightsError:
        return None
    shape = checkpoint.shape
    context_tokens = min(context_tokens, shape.longest_context_tokens)
    plan = plan_on_gpu(checkpoint, NO_GPU, context_tokens)
    is_in_4_bits = all(part.format is Format.NVFP4 for part in checkpoint.parts if part.role is Role.EXPERTS)
    if plan.total_bytes <= free_bytes or shape.is_dense or not is_in_4_bits:
        return None
    found = count_experts_on_gpu(checkpoint, context_tokens, free_bytes)
    if found < 1:
        least = plan.total_bytes - checkpoint.bytes_of(Role.EXPERTS) * (shape.num_experts - 1) // shape.num_experts
        msg = (
            f"{folder.name} needs {least / 1e9:.1f} GB of GPU memory even with experts in main memory "
            f"and {free_bytes / 1e9:.1f} GB are free; close other programs on the GPU, or see fimserver doctor --gpu"
        )
        raise WeightsError(msg)
    _logger.warning(
        "%d of %d experts of each layer fit on the GPU; the others are copied from main memory when needed: %s",
        found,
        shape.num_experts,
        SLOW_EXPERTS,
    )
    return found


def find_device(name: str) -> torch.device:
    """Return the device of a torch name. Raises ``EngineError`` if torch cannot compute there.

    ``auto`` takes the first CUDA device if torch has kernels for it, then MPS, then the CPU.
    """
    if name == "auto":
        if torch.cuda.is_available() and find_device_fault(0) is None:
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        msg = f"device {name!r} is unknown to torch; use auto, cpu, cuda, cuda:N or mps"
        raise EngineError(msg) from error
    if device.type not in ("cpu", "cuda", "mps"):
        msg = f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps"
        raise EngineError(msg)
    if device.type == "cuda":
        fault = find_device_fault(device.index or 0)
        if fault is not None:
            msg = f"device {name!r}: {fault}; or use auto or cpu"
            raise EngineError(msg)
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            msg = f"device {name!r}: torch finds {count} CUDA devices; use auto or cpu"
            raise EngineError(msg)
    if device.type == "mps" and not torch.backends.mps.is_available():
        msg = "device 'mps': torch has no MPS on this machine; use auto or cpu"
        raise EngineError(msg)
    return device
