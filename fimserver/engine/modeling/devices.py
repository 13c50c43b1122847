"""What a device has to be asked for."""

import torch


def memory_held(device: torch.device) -> int | None:
    """Bytes of the card's memory that this process holds, what it keeps for later included; ``None`` of a processor."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
