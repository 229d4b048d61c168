"""Memory that the pieces of a step take turns with, and how tensors get there."""

import math

import torch
from torch import Tensor


class Scratch:
    """Buffers that the pieces of a step take turns with, by name: memory is asked for once, and stays in the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape, float32 and contiguous; holds whatever was left there."""
        view = self.views.get((name, shape))
        if view is None:
            num = math.prod(shape)
            if name not in self.flat or self.flat[name].numel() < num:
                self.views = {key: kept for key, kept in self.views.items() if key[0] != name}
                self.flat[name] = torch.empty(num, device=self.device)
            view = self.views[name, shape] = self.flat[name][:num].view(shape)
        return view


def stacked(tensors: list[Tensor], scratch: Scratch, name: str) -> Tensor:
    """n tensors of one shape as one, float32 (n, *shape), contiguous.

    It lies in the scratch buffer of that name, or in the memory of a single tensor that is float32 and contiguous.
    """
    first = tensors[0]
    if len(tensors) == 1 and first.dtype == torch.float32 and first.is_contiguous():
        return first.detach().unsqueeze(0)
    buffer = scratch.take(name, len(tensors), *first.shape)
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        return torch.stack(tensors, out=buffer)
    torch._foreach_copy_(buffer.unbind(0), tensors)
    return buffer


def sums_of_squares(values: Tensor, scratch: Scratch, name: str) -> Tensor:
    """Sums of squares per tensor, (n, ...) to (n,); the buffer of that name is overwritten.

    Each is made of two sums: torch gives a sum that stands alone to several threads, and the result would depend on how
    many tensors are in a piece.
    """
    num, numel = len(values), values[0].numel()
    half = (numel + 1) // 2
    square = scratch.take(name, num, 2 * half)
    if numel % 2:
        square[:, -1] = 0
    torch.square(values.view(num, numel), out=square[:, :numel])
    return square.view(num, 2, half).sum(2).sum(1)


def masked(values: Tensor, all_finite: Tensor | None) -> Tensor:
    """The values, or zeros if not all are finite. all_finite: bool, 0-dim; None: the host knows that they are."""
    return values if all_finite is None else torch.where(all_finite, values, 0.0)
