"""Steps parameters in two passes: measure all gradients, and only then, if all are finite, move.

What a compiled step knows goes to `cpu.py` (CPU) or `cuda.py` (CUDA), everything else piece by piece to
`plain.py`.
"""

from collections.abc import Iterator
from itertools import compress

import torch
from torch import Tensor, nn

from optim.formulas.numbers import Coefficients
from optim.formulas.second_moment import rms_divisor
from optim.parameters import FLOATING
from optim.ranks import sharding
from optim.settings import Settings
from optim.state import State
from optim.steps import cpu, cuda, plain, stacks
from optim.steps.plain import Step
from optim.steps.scratch import Scratch
from optim.steps.stacks import Stack
from optim.steps.support import Call, CompiledStep, Table

CACHED_ELEMENTS = 1 << 19
"""Elements of a piece on the CPU: the scratch buffers of this size (2 MiB each, three to five) fit the last cache, and
an operation has enough to do for two threads to be worth waking."""
DEVICE_ELEMENTS = 1 << 24
"""Elements of a piece on other devices: 64 MiB per scratch buffer."""
WORTH_COMPILING = 1 << 20
"""Number of elements from which a compiled step pays for its compilation."""

COMPILED: dict[str, CompiledStep] = {"cpu": cpu, "cuda": cuda}
"""Who makes the compiled step, by the type of the device."""

Work = tuple[Stack, slice, list[int]]
"""A piece of a stack for the plain path, and the indices of the parameters in it."""


class Stepper:
    """Steps the parameters of a `State`; keeps the tables of the compiled step while stacks stay as they are."""

    def __init__(self, kept: State, settings: Settings) -> None:
        self.kept = kept
        self.settings = settings
        self.tables: list[Table] | None = None
        self.has_moved = False
        """Whether the step in progress may have changed a weight or its state."""

    def changed(self) -> None:
        """Must be called whenever stacks come, go, or change their tensors."""
        self.tables = None

    def end(self) -> None:
        """Frees what only a step needs, unless a compiled step has its address."""
        if not self.tables:
            for stack in self.kept.stacks:
                stack.row_now = stack.col_now = None

    def step(self, present: list[int], coefficients: Tensor, no_op: Tensor, step_key: int, so_far: Tensor) -> Tensor:
        """Steps the parameters of these indices; returns whether all gradients were finite (bool, 0-dim).

        coefficients: float32 (coefficients, groups). no_op: float32 (coefficients, 1), taken if they were not. so_far:
        whether those of the same step before these were, bool, 0-dim.
        """
        if self.tables is None:
            self._prepare()
        grads = self._gradients(present)
        calls, rest = self._measure_compiled(present, grads)
        work = list(self._pieces(rest))
        scratch = Scratch(coefficients.device)
        for stack, piece, indices in work:
            plain.measure(stack, piece, [grads[index] for index in indices], scratch)
        active = self._active(present)
        sharding.reduce_squares(active)
        all_finite = self._all_finite(present, active) & so_far
        coefficients = torch.where(all_finite, coefficients, no_op)
        self.has_moved = True
        for call in calls:
            call.advance(coefficients, all_finite, step_key)
        if not work:
            return all_finite
        by_group = [Coefficients.of(coefficients, group) for group in range(coefficients.shape[1])]
        now = Step(self.settings, by_group, _decays(coefficients), all_finite, step_key, scratch)
        known = _known_by_host(all_finite)
        if known is not False:
            now.all_finite = all_finite if known is None else None
            self._advance_plain(work, grads, now)
        return all_finite

    def _prepare(self) -> None:
        """Makes the tables of the compiled step, where it is used."""
        self.tables = []
        compiled = COMPILED.get(self.kept.parameters[0].device.type)
        if compiled is not None and self._compiles():
            fit = compiled.usable(self.kept.stacks, self.settings)
            for dtype in FLOATING:
                mine = [stack for stack in fit if stack.kind.dtype == dtype]
                for stack in mine:
                    stacks.begin_stack(stack)
                if mine:
                    self.tables.append(compiled.Table(mine, self.settings))

    def _compiles(self) -> bool:
        if self.settings.compile is None:
            return sum(stack.z.numel() for stack in self.kept.stacks) >= WORTH_COMPILING
        return self.settings.compile

    def _gradients(self, present: list[int]) -> dict[int, Tensor]:
        """The gradients by index, as far as they are on this rank.

        Raises:
            ValueError: a gradient is not dense, or not in float32 or bfloat16.
        """
        found = [grad for index in present if (grad := self.kept.parameters[index].grad) is not None]
        for layout, dtype in {(grad.layout, grad.dtype) for grad in found}:
            if layout != torch.strided:
                raise ValueError(f"a gradient is {layout}: only dense gradients can be used (Embedding(sparse=False))")
            if dtype not in FLOATING:
                raise ValueError(f"a gradient is {dtype}: must be torch.float32 or torch.bfloat16")
        return dict(zip(present, map(_local, found), strict=True))

    def _measure_compiled(self, present: list[int], grads: dict[int, Tensor]) -> tuple[list[Call], list[int]]:
        """Measures what the compiled step can take; returns its calls, and the indices left to the plain path."""
        calls: list[Call] = []
        taken: set[int] = set()
        for table in self.tables or []:
            mine = [index for index in table.indices if index in grads]
            params = [_local(self.kept.parameters[index]) for index in mine]
            fit = [p.is_contiguous() and grads[i].dtype == p.dtype for i, p in zip(mine, params, strict=True)]
            if not all(fit):
                mine, params = list(compress(mine, fit)), list(compress(params, fit))
            if mine:
                calls.append(table.measure(mine, params, [grads[index].contiguous() for index in mine]))
                taken.update(mine)
        return calls, [index for index in present if index not in taken]

    def _active(self, present: list[int]) -> list[Stack]:
        if len(present) == 1:
            return [self.kept.slots[present[0]][0]]
        chosen = set(present)
        return [stack for stack in self.kept.stacks if not chosen.isdisjoint(stack.indices)]

    def _all_finite(self, present: list[int], active: list[Stack]) -> Tensor:
        if not active:
            return torch.ones((), dtype=torch.bool, device=self.kept.parameters[0].device)
        if len(present) == 1:
            stack, slot = self.kept.slots[present[0]]
            return stack.totals[slot].isfinite()
        return torch.cat([stack.totals for stack in active]).isfinite().all()

    def _pieces(self, present: list[int]) -> Iterator[Work]:
        """Cuts stacks into parts that fit the cache; beside a parameter without gradient, one by one."""
        if len(present) == 1:
            stack, slot = self.kept.slots[present[0]]
            yield stack, slice(slot, slot + 1), present
            return
        limit = CACHED_ELEMENTS if self.kept.parameters[0].device.type == "cpu" else DEVICE_ELEMENTS
        chosen = set(present)
        for stack in self._active(present):
            size = max(1, limit // max(1, stack.kind.numel))
            for start in range(0, len(stack.indices), size):
                indices = stack.indices[start : start + size]
                if chosen.issuperset(indices):
                    yield stack, slice(start, start + len(indices)), indices
                    continue
                for slot, index in enumerate(indices, start):
                    if index in chosen:
                        yield stack, slice(slot, slot + 1), [index]

    def _advance_plain(self, work: list[Work], grads: dict[int, Tensor], now: Step) -> None:
        whole: dict[int, list[Work]] = {}
        for stack, piece, indices in work:
            whole.setdefault(id(stack), []).append((stack, piece, indices))
        for pieces in whole.values():
            stack = pieces[0][0]
            complete = sum(len(indices) for _, _, indices in pieces) == len(stack.indices)
            for piece in [slice(0, len(stack.indices))] if complete else [piece for _, piece, _ in pieces]:
                plain.blend_factors(stack, piece, now)
        divisors = self._divisors(work, grads, now)
        for (stack, piece, indices), divisor in zip(work, divisors, strict=True):
            params = [_local(self.kept.parameters[index]) for index in indices]
            plain.update(stack, piece, params, [grads[index] for index in indices], now, divisor)

    def _divisors(self, work: list[Work], grads: dict[int, Tensor], now: Step) -> list[Tensor | None]:
        """StableAdamW's divisors of sharded tensors, from one collective; None where a piece can find its own."""
        result: list[Tensor | None] = [None] * len(work)
        if not self.settings.scales_by_rms:
            return result
        numbers, sums, ranks = [], [], []
        for number, (stack, piece, indices) in enumerate(work):
            if stack.kind.split is None:
                continue
            mine = [grads[index] for index in indices]
            numbers.append(number)
            sums.append(plain.sum_of_squared_update(stack, piece, mine, now))
            ranks.append(stack.kind.split.ranks)
        sharding.reduce_together(sums, ranks)
        for number, total in zip(numbers, sums, strict=True):
            result[number] = rms_divisor(total, work[number][0].kind.whole.numel())
        return result


def _known_by_host(all_finite: Tensor) -> bool | None:
    """The value of a bool in the host's own memory; None where a device would have to be asked.

    To know it saves a pass over the gradients, which puts zeros where they are not finite.
    """
    return bool(all_finite) if all_finite.device.type == "cpu" else None


def _decays(coefficients: Tensor) -> list[bool]:
    """Whether each group's weight decay may be other than 0; always True on a device, which is not asked.

    coefficients: (coefficients, groups).
    """
    if coefficients.device.type != "cpu":
        return [True] * coefficients.shape[1]
    rows = Coefficients(*coefficients.tolist())
    return [decay != 0 or apart != 0 for decay, apart in zip(rows.decay, rows.decay_apart, strict=True)]


def _local(t: Tensor) -> Tensor:
    """`sharding.local_part` within a step, where no graph is recorded: a plain tensor is taken as it is, for a thousand
    views cost milliseconds."""
    return t if type(t) in (Tensor, nn.Parameter) and t.dim() else sharding.local_part(t)
