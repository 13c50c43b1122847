"""One DiffusionGemma on one device: the causal encoder and the bidirectional decoder, without text.

    encode   prompt tokens into a KV cache   -> next-token logits
    decode   a canvas over that cache        -> logits of every canvas position

Knows:   tensors, devices.  Never: text, prompts, stopping.
Shapes:  T prompt tokens, C canvas positions, V vocabulary; one prompt at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.cache_utils import DynamicCache

from fimserver.engine.weights import ModelMetadata, load_weights, read_metadata
from fimserver.errors import EngineError


class Model:
    """The network and what its folder says of it."""

    def __init__(self, network: DiffusionGemmaForBlockDiffusion, metadata: ModelMetadata) -> None:
        self.network = network
        self.metadata = metadata
        self.text_config = network.config.text_config
        self.canvas_length: int = network.config.canvas_length
        self.vocab_size: int = self.text_config.vocab_size
        self.device: torch.device = network.device
        self._softcap: float = network.final_logit_softcapping

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Model":
        """Model of a folder on ``device``: fp32 on CPU and MPS, bf16 on CUDA. Raises ``WeightsError``."""
        metadata = read_metadata(folder)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        network = load_weights(folder, dtype=dtype).to(device)
        return cls(network, metadata)

    @torch.inference_mode()
    def encode(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Write ``token_ids`` behind what ``cache`` holds; logits after the last one, (1, V) float32."""
        return self._to_logits(self._encode(token_ids, cache)[:, -1])

    @torch.inference_mode()
    def encode_all(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Like ``encode``; logits after each token, (1, T, V) float32."""
        return self._to_logits(self._encode(token_ids, cache))

    @torch.inference_mode()
    def decode(
        self, canvas: torch.Tensor, cache: DynamicCache, self_conditioning_logits: torch.Tensor | None
    ) -> torch.Tensor:
        """Denoise a canvas (1, C) once over a prompt's cache, which stays as it is; logits (1, C, V) float32."""
        output = self.network.model.decoder(
            decoder_input_ids=canvas,
            past_key_values=cache,
            self_conditioning_logits=self_conditioning_logits,
        )
        return self._to_logits(output.last_hidden_state)

    def _encode(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        ids = torch.tensor([list(token_ids)], device=self.device)
        output = self.network.model.encoder(input_ids=ids, past_key_values=cache)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _to_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head and soft cap, as ``DiffusionGemmaForBlockDiffusion.forward`` has them."""
        logits = self.network.lm_head(hidden).float()
        return torch.tanh(logits / self._softcap) * self._softcap


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
