"""Properties of a device that decide how the implementations compute."""

import torch


def is_cpu(device: torch.device) -> bool:
    """Whether values may be looked at: elsewhere that would wait for the device, and launches cost more than passes over memory."""
    return device.type == "cpu"
