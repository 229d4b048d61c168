"""Tensors of which each rank has some rows: put together from all ranks, and cut to the part of one, so that a run can
go on on another number of ranks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from optim.formulas.numbers import SLICE_P
from optim.ranks import sharding
from optim.steps.stacks import Kind, Split

TOGETHER_BYTES = 64 * 2**20
"""How many bytes are put together at once: fewer collectives than tensors, and little memory."""
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Piece:
    """What is on this rank of a tensor.

    part: its rows that are here, in the memory of the tensor itself. shape: of the whole. split: how it is split by
    rows; None if it is whole here.
    """

    part: Tensor
    shape: torch.Size
    split: Split | None = None

    @property
    def num_bytes(self) -> int:
        """The size of the whole tensor, in bytes."""
        return self.shape.numel() * self.part.element_size()


def piece_of(t: Tensor) -> Piece:
    """What is on this rank of a parameter, or of any tensor that may be a DTensor split by rows."""
    split = sharding.split_of(t)
    return Piece(sharding.local_part(t) if sharding.is_sharded(t) else t.detach(), t.shape, split)


def piece_of_state(name: str, part: Tensor, kind: Kind) -> Piece:
    """What is on this rank of a tensor of state. name: of the tensor, such as "z". kind: of its parameter."""
    span = _span(name, kind)
    if span is None or kind.split is None:
        return Piece(part, part.shape)
    first, _, total = span
    return Piece(part, torch.Size((total, *part.shape[1:])), Split(kind.split.ranks, first))


def put_together(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """The whole tensors, exact to the bit, on the device of their parts. Those that are split over the same ranks need
    one collective, and these must all call this with the same names in the same order. One that is whole here is not
    copied."""
    found = {name: piece.part for name, piece in pieces.items() if piece.split is None}
    split = {name: piece for name, piece in pieces.items() if piece.split is not None}
    for ranks in dict.fromkeys(piece.split.ranks for piece in split.values() if piece.split):
        found |= _summed({name: piece for name, piece in split.items() if piece.split and piece.split.ranks is ranks})
    return found


def _summed(pieces: dict[str, Piece]) -> dict[str, Tensor]:
    """Put tensors together as a sum of bytes, of which only one rank has any but 0: a sum of floats would lose the sign
    of a zero."""
    starts, total = [], 0
    for piece in pieces.values():
        starts.append(total)
        total += -(-piece.num_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
    first = next(iter(pieces.values()))
    flat = torch.zeros(total, dtype=torch.uint8, device=first.part.device)
    found = {}
    for (name, piece), start in zip(pieces.items(), starts, strict=True):
        assert piece.split is not None
        whole = flat[start : start + piece.num_bytes].view(piece.part.dtype).view(piece.shape)
        whole.narrow(0, piece.split.first_row, piece.part.shape[0]).copy_(piece.part)
        found[name] = whole
    assert first.split is not None
    dist.all_reduce(flat, group=first.split.ranks)
    return found


def in_turn(pieces: Iterable[tuple[str, Piece]], limit: int = TOGETHER_BYTES) -> Iterator[dict[str, Piece]]:
    """Pieces in their order, as many at once as are no larger together than `limit` bytes; at least one."""
    turn: dict[str, Piece] = {}
    total = 0
    for name, piece in pieces:
        if turn and total + piece.num_bytes > limit:
            yield turn
            turn, total = {}, 0
        turn[name] = piece
        total += piece.num_bytes
    if turn:
        yield turn


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
