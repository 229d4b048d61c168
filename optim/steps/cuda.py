"""The fast path on CUDA: the kernels of `cuda_kernels.py`, and the tables of addresses and units they work from.

A step is a few launches for each kind of tile there is, whatever the number of tensors. Triton comes with torch on
Linux; elsewhere it can be installed. It compiles a kernel on first use (seconds for all of them) and keeps it in the
user's cache folder.
"""

import contextlib
import functools
import importlib.util
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.settings import Settings
from optim.steps.stacks import Kind, Stack
from optim.steps.support import numbered, supports, supports_stack
from optim.steps.trial import reason_against, warn_once

TILE_ELEMENTS = 2048
MOST_ROWS = 8
"""Largest number of rows in a tile; a tile of narrow rows may have more."""
MOST_PLANS = 64
"""Largest number of selections of parameters whose plans are kept, besides those of a single parameter."""
ALIGNMENT = 16
"""Bytes, and elements, on whose multiples the kernels read fastest."""


class Tile(NamedTuple):
    """A form that the kernels are compiled in: for tiles of T_A rows of T_W elements."""

    T_A: int
    T_W: int
    factored: bool
    bf16: bool
    aligned: bool


def power_of_2(value: int) -> int:
    """The smallest power of 2 that is not below a value of 1 or more."""
    return 1 << max(0, value - 1).bit_length()


def axes_of(kind: Kind) -> tuple[int, int, int]:
    """A, B and K: the factored axes and the elements along the others; a single row where nothing is factored."""
    if kind.axes is None:
        return 1, kind.numel, 1
    return kind.shape[0], kind.shape[1], kind.shape[2:].numel()


def tile_of(stack: Stack) -> Tile:
    """The tile for a stack: wide enough for whole cache lines, unless the tensor is narrow or low itself."""
    num_rows, B, K = axes_of(stack.kind)
    T_A = min(power_of_2(num_rows), MOST_ROWS)
    T_W = min(power_of_2(B * K), TILE_ELEMENTS // T_A)
    T_A = min(power_of_2(num_rows), TILE_ELEMENTS // T_W)
    aligned = B * K % ALIGNMENT == 0 and stack.z.data_ptr() % ALIGNMENT == 0
    return Tile(T_A, T_W, stack.kind.axes is not None, stack.kind.dtype == torch.bfloat16, aligned)


@functools.cache
def kernels() -> Any:
    """The module of the kernels.

    Raises:
        ImportError: there is no Triton here.
    """
    return importlib.import_module("optim.steps.cuda_kernels")


FAILURES = (ImportError, RuntimeError, OSError, subprocess.SubprocessError, AttributeError, TypeError, ValueError)
"""What Triton raises where a driver, a compiler or a version of it does not fit."""


def usable(stacks: list[Stack], settings: Settings) -> list[Stack]:
    """The stacks that the kernels support; [] with a warning where they cannot be had, or go wrong.

    What is tried are copies of the smallest tensor for each form that the kernels are compiled in here, so that nothing
    is compiled twice.
    """
    fit = [stack for stack in stacks if supports_stack(stack, settings)] if supports(settings) else []
    smallest: dict[Tile, Kind] = {}
    for stack in fit:
        tile, kind = tile_of(stack), stack.kind
        if kind.numel and (tile not in smallest or kind.numel < smallest[tile].numel):
            smallest[tile] = kind.whole_here()
    reason = _reason_against(tuple(smallest.values()), settings, stacks[0].z.device) if smallest else ""
    if reason:
        warn_once(reason)
    return [] if reason else fit


@functools.cache
def _reason_against(kinds: tuple[Kind, ...], settings: Settings, device: torch.device) -> str:
    """Why the kernels cannot be used here; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return reason_against(kinds, settings, device, Table)
    except FAILURES as error:
        said = str(error).strip().splitlines() or ["no message"]
        return f"triton failed with {type(error).__name__}: {said[-1]}"


class Items:
    """Lists of items of some numbers each, one after the other in a single list: one copy to the device."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.filled = 0

    def add(self, *columns: Tensor) -> tuple[int, int]:
        """Appends a list of items; returns its stretch: the number of the first, counted in items, and how many.

        columns: the first numbers of all items, the second ones, ...; each (n,).
        """
        size = len(columns)
        padding = -self.filled % size
        self.parts += [torch.zeros(padding, dtype=torch.int64), torch.stack(columns, dim=1).reshape(-1)]
        first = (self.filled + padding) // size
        self.filled += padding + self.parts[-1].numel()
        return first, len(columns[0])

    def on(self, device: torch.device) -> Tensor:
        """The single list, int32, on the device."""
        return _pinned(torch.cat(self.parts).to(torch.int32), device).to(device, non_blocking=True)


@dataclass
class Plan:
    """What is launched for a selection of parameters: stretches (first, number) of one list on the device."""

    lists: Tensor  # int32
    rows: Tensor  # int64, their rows in the table
    units: dict[Tile, tuple[int, int]]
    gathers: tuple[int, int]
    columns: tuple[int, int]
    factor_rows: dict[int, tuple[int, int]]  # by K, rounded up to a power of 2
    jobs: tuple[int, int]


class Table:
    """The addresses of parameters and of their state, one row per parameter, on their device."""

    def __init__(self, stacks: list[Stack], settings: Settings) -> None:
        self.settings = settings
        self.device = stacks[0].z.device
        self.indices = [index for stack in stacks for index in stack.indices]
        self.row_of = {index: row for row, index in enumerate(self.indices)}
        self.scratch_size = self.exact_size = 0
        self.tiles: list[Tile] = []
        self.host = torch.cat([self._rows_of(stack) for stack in stacks])
        self.jobs = self.host.to(self.device)
        self.mirror = torch.zeros(len(self.host), 2, dtype=torch.int64)
        self.addresses = self.mirror.to(self.device, copy=True)
        self.plans: dict[tuple[int, ...], Plan] = {}

    # ------------------------------------------------------------------ the table

    def _rows_of(self, stack: Stack) -> Tensor:
        """What does not change from step to step in the rows of a stack, int64 (n, columns)."""
        columns: Sequence[str] = kernels().COLUMNS
        kind, num = stack.kind, len(stack.indices)
        values: dict[str, Tensor | int] = {**stack.addresses()}
        slots = torch.arange(num)
        A, B, K = axes_of(kind)
        tile = tile_of(stack)
        chunks, strips = -(-A // (tile.T_A * kernels().CHUNK.value)), -(-B * K // tile.T_W)
        values |= {"A": A, "B": B, "K": K, "whole_a": kind.whole[0] if kind.axes is not None else 1}
        values |= {"chunks": chunks, "strips": strips, "offset": kind.offset, "whole": kind.whole.numel()}
        values |= {"group": kind.group, "key": stack.keys.cpu().to(torch.int64) & 0xFFFFFFFF}
        values["partial"] = self.exact_size + slots * (2 * chunks * strips)
        self.exact_size += num * 2 * chunks * strips
        if tile.factored:
            values["row_partial"] = self.scratch_size + slots * (strips * A * K)
            self.scratch_size += num * strips * A * K
            values["col_partial"] = self.scratch_size + slots * (chunks * B * K)
            self.scratch_size += num * chunks * B * K
        rows = torch.zeros(num, len(columns), dtype=torch.int64)
        for name, value in values.items():
            rows[:, columns.index(name)] = value
        self.tiles += [tile] * num
        return rows

    def _column(self, rows: Tensor, name: str) -> Tensor:
        return self.host[rows, kernels().COLUMNS.index(name)]

    def _plan(self, present: Sequence[int]) -> Plan:
        key = tuple(present)
        if key not in self.plans:
            if len(self.plans) > len(self.indices) + MOST_PLANS:
                self.plans.clear()
            self.plans[key] = self._new_plan([self.row_of[index] for index in present])
        return self.plans[key]

    def _new_plan(self, chosen: list[int]) -> Plan:
        items = Items()
        by_tile: dict[Tile, list[int]] = {}
        for row in chosen:
            by_tile.setdefault(self.tiles[row], []).append(row)
        units = {}
        for tile, members in by_tile.items():
            rows = torch.tensor(members)
            strips = self._column(rows, "strips")
            job, number = numbered(rows, self._column(rows, "chunks") * strips)
            here = self._column(job, "strips").clamp_min(1)
            units[tile] = items.add(job, number // here, number % here)
        factored = torch.tensor([row for row in chosen if self.tiles[row].factored], dtype=torch.int64)
        vector = kernels().VECTOR.value
        row_numel = self._column(factored, "A") * self._column(factored, "K")
        col_numel = self._column(factored, "B") * self._column(factored, "K")
        row_job, row_tile = numbered(factored, -(-row_numel // vector))
        col_job, col_tile = numbered(factored, -(-col_numel // vector))
        is_col = torch.cat((torch.zeros_like(row_job), torch.ones_like(col_job)))
        gathers = items.add(torch.cat((row_job, col_job)), is_col, torch.cat((row_tile, col_tile)))
        columns = items.add(col_job, col_tile)
        factor_rows = {}
        by_kp = {row: power_of_2(int(k)) for row, k in zip(factored.tolist(), self._column(factored, "K"), strict=True)}
        for KP in sorted(set(by_kp.values())):
            rows = torch.tensor([row for row, its in by_kp.items() if its == KP])
            factor_rows[KP] = items.add(*numbered(rows, -(-self._column(rows, "A") // (vector // KP))))
        jobs = items.add(torch.tensor(chosen))
        return Plan(items.on(self.device), torch.tensor(chosen), units, gathers, columns, factor_rows, jobs)

    # ------------------------------------------------------------------ a step

    def measure(self, present: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor]) -> "Call":
        """See `support.Table`."""
        plan = self._plan(present)
        addresses = torch.tensor([[p.data_ptr() for p in params], [g.data_ptr() for g in grads]], dtype=torch.int64)
        aligned = not bool((addresses % ALIGNMENT).any())
        self.mirror[plan.rows] = addresses.t()
        self.addresses.copy_(_pinned(self.mirror, self.device), non_blocking=True)
        call = Call(self, plan, aligned, (*params, *grads))
        call.measure()
        return call


class Call:
    """A step of some rows of a table, measured and not yet made."""

    def __init__(self, table: Table, plan: Plan, aligned: bool, alive: tuple[Tensor, ...]) -> None:
        self.table, self.plan, self.aligned, self.alive = table, plan, aligned, alive
        device = table.device
        self.scratch = torch.empty(max(1, table.scratch_size), device=device)
        self.exact_scratch = torch.empty(max(1, table.exact_size), dtype=torch.float64, device=device)

    def _by_tile(self) -> Iterator[tuple[tuple[int, int], dict[str, int | bool]]]:
        """Stretches of units, and the form of the kernels for each."""
        for tile, stretch in self.plan.units.items():
            names = {"FACTORED": tile.factored, "BF16": tile.bf16, "ALIGNED": tile.aligned and self.aligned}
            yield stretch, {"T_A": tile.T_A, "T_W": tile.T_W, **names}

    def _launch(self, kernel: Any, stretch: tuple[int, int], *args: Any, addresses: bool = False, **form: Any) -> None:
        """Launches one program for each item of a stretch of the plan."""
        first, num = stretch
        if num:
            jobs = (self.table.jobs, self.table.addresses) if addresses else (self.table.jobs,)
            kernel[(num,)](*jobs, self.plan.lists, first, *args, **form, enable_fp_fusion=True)

    def measure(self) -> None:
        """Launches the kernels that measure; see `support.Table`."""
        run, plan = kernels(), self.plan
        with _on(self.table.device):
            for units, tile in self._by_tile():
                self._launch(run.measure_units, units, self.scratch, self.exact_scratch, addresses=True, **tile)
            self._launch(run.gather_factors, plan.gathers, self.scratch)
            self._launch(run.reduce_units, plan.jobs, self.exact_scratch, None, WHAT=run.TOTAL_OF_SQUARES.value)

    def advance(self, coefficients: Tensor, all_finite: Tensor, step_key: int) -> None:
        """See `support.Call`."""
        run, plan, settings, found = kernels(), self.plan, self.table.settings, self.exact_scratch
        of_step = (coefficients.t().contiguous(), all_finite)
        form = {"ATAN": settings.eps is None}
        with _on(self.table.device):
            self._launch(run.blend_columns, plan.columns, *of_step)
            for KP, rows in plan.factor_rows.items():
                self._launch(run.blend_rows, rows, *of_step, KP=KP)
            if settings.scales_by_rms:
                for units, tile in self._by_tile():
                    self._launch(run.squared_update_units, units, *of_step, found, addresses=True, **tile, **form)
                self._launch(run.reduce_units, plan.jobs, found, all_finite, WHAT=run.RMS_DIVISOR.value)
            form |= {"RMS": settings.scales_by_rms, "STOCHASTIC": settings.stochastic_rounding}
            for units, tile in self._by_tile():
                self._launch(run.advance_units, units, *of_step, found, step_key, addresses=True, **tile, **form)
            self._launch(run.reduce_units, plan.jobs, found, all_finite, WHAT=run.PRODIGY_SUMS.value)


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """A copy from which a device can read on its own, while the host goes on."""
    return values.clone() if device.type == "cpu" else torch.empty_like(values, pin_memory=True).copy_(values)


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
