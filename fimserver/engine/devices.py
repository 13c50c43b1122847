"""What a device has to be asked for."""

import torch


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
