"""The fast path on the CPU: `cpu.cpp`, compiled once on first use, and the table of addresses it works from.

The source needs no header but the C++ standard library's, so that compiling takes seconds; it is called through ctypes.
The finished library is kept in the user's cache folder under a name made of the source, the compiler and the machine.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.formulas import rounding
from optim.formulas.numbers import SLICE_P, Coefficients
from optim.formulas.second_moment import ATAN_POLYNOMIAL, TINY
from optim.settings import Settings
from optim.steps.stacks import Kind, Stack
from optim.steps.support import numbered, supports, supports_stack
from optim.steps.trial import reason_against, warn_once

SOURCE = Path(__file__).with_name("cpu.cpp")
TILES = "cpu_tiles.h"
WIDEST = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
ARITHMETIC = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
OPTIMIZED = "-O3"
FLAGS = ("-march=native", "-std=c++17", *ARITHMETIC, *WIDEST, "-fopenmp", "-shared", "-fPIC")
TILE = 512
"""Elements that stay within the registers' reach while the step is made of them."""
BLOCK_ELEMENTS = 1 << 15
"""Elements of a block, which stay in the cache of one core."""
FEWEST_ROWS = 16
"""Smallest number of rows in a block, however wide: each block leaves a row of column sums to be added up."""
JOB = {
    "y": "void *",
    "g": "const void *",
    "z": "void *",
    "row": "float *",  # R (A, K); null where nothing is factored, or A is 0
    "col": "float *",  # C (B, K); null where nothing is factored
    "v": "float *",  # full second moment (numel,), or null
    "s": "uint16_t *",  # bfloat16; null once d is frozen
    "p0": "const uint16_t *",  # bfloat16; null where the parameter started at zero
    "row_now": "float *",  # within a step: sums of g^2, then sqrt(R / mean R)
    "col_now": "float *",  # within a step: sums of g^2, then sqrt(C)
    "totals": "float *",  # sum of g^2
    "sums": "double *",  # num, den
    "partial": "double *",  # (blocks, 2): what blocks find before it is added up
    "col_partial": "float *",  # (blocks, B * K), where there is more than one block
    "A": "int64_t ",  # rows: the length of the first factored axis
    "B": "int64_t ",  # the length of the second
    "K": "int64_t ",  # elements along the axes that are not factored
    "whole_a": "int64_t ",  # A of the unsharded tensor
    "rows": "int64_t ",  # rows (of B * K elements) per block
    "offset": "int64_t ",  # number of the first element here in the unsharded tensor
    "whole": "int64_t ",  # elements of the unsharded tensor
    "group": "int64_t ",
    "key": "int64_t ",  # for the rounding
}
"""The fields of a row of the table, each of 8 bytes, and their types in C++."""
AT = {name: place for place, name in enumerate(JOB)}


def layout() -> str:
    """The fields of a row and the coefficients, in their order."""
    fields = " ".join(f"{kind}{name};" for name, kind in JOB.items())
    return f"{fields} float {', '.join(Coefficients._fields)};"


def definitions() -> list[str]:
    """What C++ and Python must both know, as arguments of the compiler: it stands in Python alone."""
    names = {
        "JOB_FIELDS": " ".join(f"{kind}{name};" for name, kind in JOB.items()),
        "COEFFICIENT_NAMES": ", ".join(Coefficients._fields),
        "SLICE_P": f"{SLICE_P}",
        "TILE": f"{TILE}",
        "TINY": f"{TINY!r}f",
        "HASH_ELEMENT": f"{rounding.GOLDEN}u",
        "HASH_FIRST": f"{rounding.MULTIPLIERS[0]}u",
        "HASH_SECOND": f"{rounding.MULTIPLIERS[1]}u",
        **{f"ATAN_{place}": f"{value!r}f" for place, value in enumerate(ATAN_POLYNOMIAL)},
    }
    return [f"-DSDTRAIN_{name}={value}" for name, value in names.items()]


class UnavailableError(Exception):
    """The library cannot be had here; the text says why."""


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UnavailableError(f"{command[0]} failed: {next((line for line in said if 'error' in line), said[-1])}")
    return done.stdout


def _cache_folder() -> Path:
    """Where the library is kept: the user's cache folder or, where that cannot be written, a new temporary one."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(chosen) if chosen else Path.home() / ".cache") / "sdtrain-optim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sdtrain-optim-"))


def _machine() -> str:
    """The processor, as far as the library depends on it: one built for another must not be loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.node()} {platform.machine()} {platform.processor()}"
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library; the first call on a machine takes a few seconds.

    Raises:
        UnavailableError: there is no compiler, or what it made does not work.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise UnavailableError("no C++ compiler (g++, clang++, or $CXX) was found")
    texts = (SOURCE.read_text(), SOURCE.with_name(TILES).read_text())
    flags = (OPTIMIZED, *FLAGS, *definitions())
    identity = "\n".join((*texts, *flags, _run((compiler, "--version")), _machine()))
    path = _cache_folder() / f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        # built under another name and moved: another process never sees half of it
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "cpu.so"
            _run((compiler, *flags, str(SOURCE), "-o", str(built)))
            built.replace(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} does not load: {error}") from error
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.sdtrain_job_bytes.restype = number
    lists: tuple[type[ctypes._SimpleCData[Any]], ...] = (pointer, number, pointer, number)
    loaded.sdtrain_measure.argtypes = [*lists, flag, flag]
    loaded.sdtrain_measure.restype = None
    loaded.sdtrain_advance.argtypes = [*lists, pointer, pointer, flag, flag, flag, flag, ctypes.c_uint32, flag]
    loaded.sdtrain_advance.restype = None
    loaded.sdtrain_layout.restype = ctypes.c_char_p
    if loaded.sdtrain_job_bytes() != 8 * len(JOB):
        raise UnavailableError("the compiler lays structures out in an unexpected way")
    if "".join(loaded.sdtrain_layout().decode().split()) != "".join(layout().split()):
        raise UnavailableError(f"{path} was compiled for fields in another order")
    return loaded


@functools.cache
def unavailable() -> str:
    """Why the library cannot be had here; "" if it can."""
    try:
        library()
    except UnavailableError as reason:
        return str(reason)
    return ""


def usable(stacks: list[Stack], settings: Settings) -> list[Stack]:
    """The stacks that the library supports; [] with a warning where it cannot be had, or goes wrong.

    It is tried on copies of one tensor for each way in which it goes through tensors, of few rows: rows are alike.
    """
    fit = [stack for stack in stacks if supports_stack(stack, settings)] if supports(settings) else []
    trials: dict[tuple[torch.dtype, bool, int, bool], Kind] = {}
    for stack in fit:
        kind = _with_few_rows(stack.kind.whole_here())
        _, B, K = _axes_of(kind)
        way = (kind.dtype, kind.axes is None, min(2, K), B * K > TILE)
        if kind.numel > (trials[way].numel if way in trials else 0):
            trials[way] = kind
    reason = _reason_against(tuple(trials.values()), settings) if fit else ""
    if reason:
        warn_once(reason)
    return [] if reason else fit


@functools.cache
def _reason_against(kinds: tuple[Kind, ...], settings: Settings) -> str:
    """Why the library cannot be used here; "" if it can."""
    return unavailable() or reason_against(kinds, settings, torch.device("cpu"), Table)


def _axes_of(kind: Kind) -> tuple[int, int, int]:
    """A, B and K; without factors there are no rows, and any cut will do."""
    if kind.axes is None:
        return kind.numel, 1, 1
    return kind.shape[0], kind.shape[1], kind.shape[2:].numel()


def _rows_of_a_block(kind: Kind) -> int:
    _, B, K = _axes_of(kind)
    return max(FEWEST_ROWS, BLOCK_ELEMENTS // max(1, B * K))


def _with_few_rows(kind: Kind) -> Kind:
    """A tensor of at most two blocks, the second with a single row."""
    if kind.axes is None:
        shape = torch.Size([min(kind.numel, BLOCK_ELEMENTS + 1)])
    else:
        shape = torch.Size([min(kind.shape[0], _rows_of_a_block(kind) + 1), *kind.shape[1:]])
    return kind._replace(shape=shape, whole=shape)


class Table:
    """The addresses of parameters of one dtype and of their state, one row per parameter."""

    def __init__(self, stacks: list[Stack], settings: Settings) -> None:
        self.settings = settings
        self.bf16 = stacks[0].kind.dtype == torch.bfloat16
        self.indices = [index for stack in stacks for index in stack.indices]
        self.row_of = {index: row for row, index in enumerate(self.indices)}
        self.jobs = torch.cat([self._rows_of(stack) for stack in stacks])
        self.blocks = (self.jobs[:, AT["A"]] + self.jobs[:, AT["rows"]] - 1) // self.jobs[:, AT["rows"]]
        self.units = self._units(self.jobs, self.blocks)
        self._make_room()

    def _rows_of(self, stack: Stack) -> Tensor:
        """What does not change from step to step in the rows of a stack, int64 (n, fields)."""
        kind, num = stack.kind, len(stack.indices)
        rows = torch.zeros(num, len(JOB), dtype=torch.int64)
        for name, address in stack.addresses().items():
            rows[:, AT[name]] = address
        A, B, K = _axes_of(kind)
        sizes = {"A": A, "B": B, "K": K, "whole_a": kind.whole[0] if kind.axes is not None else A}
        sizes |= {"rows": _rows_of_a_block(kind), "offset": kind.offset, "whole": kind.whole.numel()}
        for name, value in (sizes | {"group": kind.group}).items():
            rows[:, AT[name]] = value
        rows[:, AT["key"]] = stack.keys.to(torch.int64) & 0xFFFFFFFF
        return rows

    @staticmethod
    def _units(jobs: Tensor, blocks: Tensor) -> Tensor:
        """The blocks of all rows, int64 (units, 2): the number of the row, the number of the block in it."""
        return torch.stack(numbered(torch.arange(len(jobs)), blocks), dim=1).contiguous()

    def _make_room(self) -> None:
        """Makes scratch for what blocks find before it is added up."""
        self.partial = torch.zeros(max(1, int(self.blocks.sum())), 2, dtype=torch.float64)
        self.jobs[:, AT["partial"]] = self.partial.data_ptr() + 16 * (torch.cumsum(self.blocks, 0) - self.blocks)
        width = self.jobs[:, AT["B"]] * self.jobs[:, AT["K"]]
        many = (self.blocks > 1) & (self.jobs[:, AT["col"]] != 0)
        sizes = torch.where(many, self.blocks * width, 0)
        self.col_partial = torch.empty(max(1, int(sizes.sum())))
        self.jobs[:, AT["col_partial"]] = self.col_partial.data_ptr() + 4 * (torch.cumsum(sizes, 0) - sizes)

    def _chosen(
        self, present: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Jobs and units of the parameters that are present, in the order of the table, with this step's addresses."""
        if len(present) == len(self.indices):
            jobs, units = self.jobs, self.units
        else:
            rows = torch.tensor([self.row_of[index] for index in present])
            jobs = self.jobs[rows]
            units = self._units(jobs, self.blocks[rows])
        jobs[:, AT["y"]] = torch.tensor([p.data_ptr() for p in params])
        jobs[:, AT["g"]] = torch.tensor([g.data_ptr() for g in grads])
        return jobs, units

    def measure(self, present: Sequence[int], params: Sequence[Tensor], grads: Sequence[Tensor]) -> "Call":
        """See `support.Table`."""
        jobs, units = self._chosen(present, params, grads)
        library().sdtrain_measure(
            jobs.data_ptr(), len(jobs), units.data_ptr(), len(units), self.bf16, torch.get_num_threads()
        )
        return Call(self, jobs, units, (*params, *grads))


class Call:
    """A step of some rows of a table, measured and not yet made."""

    def __init__(self, table: Table, jobs: Tensor, units: Tensor, alive: tuple[Tensor, ...]) -> None:
        self.table, self.jobs, self.units, self.alive = table, jobs, units, alive

    def advance(self, coefficients: Tensor, all_finite: Tensor, step_key: int) -> None:
        """See `support.Call`."""
        table, settings = self.table, self.table.settings
        by_group = coefficients.t().contiguous()
        library().sdtrain_advance(
            self.jobs.data_ptr(),
            len(self.jobs),
            self.units.data_ptr(),
            len(self.units),
            by_group.data_ptr(),
            all_finite.data_ptr(),
            table.bf16,
            settings.eps is None,
            settings.scales_by_rms,
            settings.stochastic_rounding,
            step_key & 0xFFFFFFFF,
            torch.get_num_threads(),
        )
