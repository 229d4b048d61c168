"""State of sharded parameters: put together from all ranks, and cut to the part of one, so that a run can go on on
another number of ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from optim.formulas.numbers import SLICE_P
from optim.steps.stacks import Kind


def gathered(name: str, part: Tensor, kind: Kind) -> Tensor:
    """The whole of a tensor of state, exact to the bit, from the parts of all ranks, which must all call this.

    name: of the tensor, such as "z". part: what is here of it, for one parameter. kind: of that parameter. Returns a
        new tensor on the device of `part`.
    """
    span = _span(name, kind)
    if span is None or kind.split is None:
        return part.clone()
    first, num, total = span
    whole = part.new_zeros(total, *part.shape[1:])
    whole.narrow(0, first, num).copy_(part)
    # bytes, of which only one rank has any but 0: a sum of floats would lose the sign of a zero
    dist.all_reduce(whole.view(-1).view(torch.uint8), group=kind.split.ranks)
    return whole


def part_here(name: str, whole: Tensor, kind: Kind) -> Tensor:
    """This rank's part of a whole tensor of state, a view; a tensor that is a part already is returned as it is."""
    span = _span(name, kind)
    if span is None or whole.dim() == 0 or whole.shape[0] != span[2]:
        return whole
    return whole.narrow(0, span[0], span[1])


def _span(name: str, kind: Kind) -> tuple[int, int, int] | None:
    """What is here of a tensor of state along its first axis: (the first, how many, of how many); None if all is."""
    if kind.split is None:
        return None
    match name:
        case "s" | "p0":  # every 11th element of the whole parameter
            return -(-kind.offset // SLICE_P), kind.num_slices, -(-kind.whole.numel() // SLICE_P)
        case "norms":  # sums over the whole parameter
            return None
        case "col" if kind.axes is not None and kind.axes[0] == 0:  # means over all rows
            return None
        case _:  # z, y, v, row, and col where it keeps the first axis
            return kind.split.first_row, kind.shape[0], kind.whole[0]
