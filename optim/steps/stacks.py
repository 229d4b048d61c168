"""Stacks: the parameters of one group that share their shape, with their state packed in few tensors.

A model has thousands of tensors but few shapes, so the work is done on pieces of a stack: large enough that calls do
not cost, small enough that a piece stays in the cache from its first operation to its last. What a step
does with them is in `plain.py`, and its fast twins are `cpu.py` and `cuda.py`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from optim.formulas.numbers import SLICE_P, exact_dtype
from optim.settings import Settings

NUM_SUMS = 3
"""Sums per tensor: <g, p0 - z>; |s|_1 or, with SPEED, |p0 - z|_1; and with SPEED |p0 - z|_2 squared."""


@dataclass(frozen=True)
class Split:
    """How a tensor is split by rows: over which ranks, and the number of the first row here."""

    ranks: "dist.ProcessGroup"
    first_row: int


class Kind(NamedTuple):
    """What parameters must have in common to share a stack."""

    group: int
    shape: torch.Size  # of the part that is here
    whole: torch.Size  # of the whole tensor, which differs from `shape` in a shard
    split: Split | None  # how it is split over ranks; None if it is whole here
    offset: int  # number of the first element here within the whole tensor
    dtype: torch.dtype
    axes: tuple[int, int] | None  # over which the second moment is factored
    starts_at_zero: bool  # then nothing is stored for p0

    def whole_here(self) -> "Kind":
        """A tensor of the same shape that is not split, for trials; p0 is stored."""
        return self._replace(group=0, whole=self.shape, split=None, offset=0, starts_at_zero=False)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def first_slice(self) -> int:
        """Number of the first element here that is one of every 11th of the whole tensor."""
        return -self.offset % SLICE_P

    @property
    def num_slices(self) -> int:
        return max(0, -(-(self.numel - self.first_slice) // SLICE_P))

    def sliced(self, values: Tensor) -> Tensor:
        """Every 11th element of the whole tensors: (n, numel) to (n, num_slices), a view."""
        return values[:, self.first_slice :: SLICE_P]


@dataclass(eq=False)
class Stack:
    """n parameters of one kind and their state; `indices` are theirs among all parameters of the optimizer."""

    kind: Kind
    indices: list[int]
    indices_here: Tensor  # the same, int64 (n,), on the device
    keys: Tensor  # int32 (n,): for the rounding
    z: Tensor  # (n, *shape), the parameter's dtype: the fast iterate, or the first moment without Schedule-Free
    row: Tensor | None = None  # (n, ...), R: mean of g^2 over the second factored axis, size 1 there
    col: Tensor | None = None  # (n, ...), C: mean over the first
    v: Tensor | None = None  # (n, *shape) float32, where nothing is factored
    s: Tensor | None = None  # (n, num_slices) bfloat16
    p0: Tensor | None = None  # (n, num_slices) bfloat16
    norms: Tensor | None = None  # (n, 3) float64, SPEED: averaged dot product, largest |p0 - z|_1 and |p0 - z|_2
    # within a step only
    row_now: Tensor | None = None  # float32 like row: sums of g^2, then sqrt(R / mean(R))
    col_now: Tensor | None = None  # float32 like col: sums of g^2, then sqrt(C)
    totals: Tensor = field(init=False)  # (n,) float32, sum of g^2 here
    sums: Tensor = field(init=False)  # (n, 3) float64

    def __post_init__(self) -> None:
        device = self.z.device
        self.totals = torch.zeros(len(self.indices), device=device)
        self.sums = torch.zeros(len(self.indices), NUM_SUMS, dtype=exact_dtype(device), device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of state this stack has, by the names of its fields."""
        named = {
            "z": self.z,
            "row": self.row,
            "col": self.col,
            "v": self.v,
            "s": self.s,
            "p0": self.p0,
            "norms": self.norms,
        }
        return {name: value for name, value in named.items() if value is not None}

    def state_of(self, slot: int) -> dict[str, Tensor]:
        """The state of one parameter of this stack, as views."""
        return {name: value[slot] for name, value in self.tensors().items()}

    def states(self) -> list[dict[str, Tensor]]:
        """The state of each parameter of this stack, as views; quicker than one after the other."""
        rows = {name: value.unbind() for name, value in self.tensors().items()}
        return [{name: row[slot] for name, row in rows.items()} for slot in range(len(self.indices))]

    def addresses(self) -> dict[str, Tensor]:
        """Where in memory each parameter's state, and what a step finds, begins: int64 (n,), by field."""
        named = {**self.tensors(), "totals": self.totals, "sums": self.sums}
        if self.row_now is not None and self.col_now is not None:
            named |= {"row_now": self.row_now, "col_now": self.col_now}
        slots = torch.arange(len(self.indices))
        return {name: t.data_ptr() + slots * (t.stride(0) * t.element_size()) for name, t in named.items()}

    def free_prodigy_state(self) -> None:
        """Drops what is not needed once d is frozen."""
        self.p0 = self.s = self.norms = None

    def begin_estimate(self, start: Tensor, settings: Settings) -> None:
        """Makes what estimating d needs, as at the first step, with `start`, (n, *shape), as the start values."""
        self.kind = self.kind._replace(starts_at_zero=False)
        self.p0 = self.kind.sliced(start.reshape(len(self.indices), -1)).to(torch.bfloat16)
        if settings.use_speed:
            self.norms = torch.zeros_like(self.sums)
        else:
            self.s = torch.zeros_like(self.p0)


def build_stack(kind: Kind, indices: list[int], keys: list[int], weights: list[Tensor], settings: Settings) -> Stack:
    """A stack at its start: z and p0 are the weights (or the first moment is 0), everything else is 0."""
    num, shape, device = len(indices), kind.shape, weights[0].device
    flat = [weight.detach().reshape(-1) for weight in weights]
    z = torch.stack([weight.detach() for weight in weights])
    stack = Stack(
        kind=kind,
        indices=indices,
        indices_here=torch.tensor(indices, device=device),
        keys=torch.tensor(keys, dtype=torch.int32, device=device),
        z=z if settings.use_schedulefree else torch.zeros_like(z),
    )
    if kind.axes is None:
        stack.v = torch.zeros(num, *shape, device=device)
    else:
        first, second = kind.axes
        factor_dtype = torch.float32 if settings.factored_fp32 else kind.dtype
        rows, cols = list(shape), list(shape)
        rows[second] = cols[first] = 1
        stack.row = torch.zeros(num, *rows, dtype=factor_dtype, device=device)
        stack.col = torch.zeros(num, *cols, dtype=factor_dtype, device=device)
    if not kind.starts_at_zero:
        stack.p0 = torch.stack([values[kind.first_slice :: SLICE_P].to(torch.bfloat16) for values in flat])
    if settings.use_speed:
        stack.norms = torch.zeros(num, 3, dtype=stack.sums.dtype, device=device)
    else:
        stack.s = torch.zeros(num, kind.num_slices, dtype=torch.bfloat16, device=device)
    return stack


def begin_stack(stack: Stack) -> None:
    """Makes room for the sums of a step, and sets them to 0."""
    if stack.row is not None and stack.col is not None and stack.row_now is None:
        stack.row_now = torch.empty_like(stack.row, dtype=torch.float32)
        stack.col_now = torch.empty_like(stack.col, dtype=torch.float32)
    stack.totals.zero_()
    stack.sums.zero_()
