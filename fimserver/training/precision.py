"""In which numbers a device multiplies fastest."""

from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU and on CPUs with instructions for it, else fp32: without them bf16 is fifty times slower."""
    has_it = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001  as torch's own tests
    return torch.bfloat16 if has_it else torch.float32
