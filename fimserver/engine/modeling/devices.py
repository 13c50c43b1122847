"""Query and synchronize a device."""

import torch


def memory_held(device: torch.device) -> int | None:
    """Return the bytes of GPU memory that this process holds, including torch's reserve; ``None`` for other devices."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None


def wait_for(device: torch.device) -> None:
    """Wait until a device has finished its queued work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
