"""Sending tensors to the device that computes, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on `device` in `dtype`, of the same numbers; the host does not wait for the device.

    From ordinary memory CUDA copies only once all work before it is done, so a tensor goes by way of pinned memory. The
    type is changed first: a copy that does both makes a tensor in ordinary memory on the way.
    """
    tensor = tensor.to(dtype or tensor.dtype)
    if tensor.device == device:
        return tensor
    return pinned(tensor, device).to(device, non_blocking=tensor.device.type == "cpu")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor where `device` fetches it from without a wait: pinned, if it lies on the CPU for a CUDA card."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
