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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optim.settings import Settings
from optim.steps.stacks import Stack
from optim.steps.support import numbered, supports, supports_stack

SOURCE = Path(__file__).with_name("cpu.cpp")
TILES = Path(__file__).with_name("cpu_tiles.h")
WIDEST = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
ARITHMETIC = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
FLAGS = ("-O3", "-march=native", "-std=c++17", *ARITHMETIC, *WIDEST, "-fopenmp", "-shared", "-fPIC")
BLOCK_ELEMENTS = 1 << 15
FEWEST_ROWS = 16
"""Of a block, however wide: each block leaves a row of column sums to be added up."""
STATE = ("y", "g", "z", "row", "col", "v", "s", "p0")
WITHIN_THE_STEP = ("row_now", "col_now", "totals", "sums", "partial", "col_partial")
SIZES = ("A", "B", "K", "whole_a", "rows", "offset", "whole", "group", "key")
COLUMNS = (*STATE, *WITHIN_THE_STEP, *SIZES)
"""The fields of `Job` in cpu.cpp, each an int64."""

AT = {name: place for place, name in enumerate(COLUMNS)}


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
    """What the instruction set depends on: a library built for another processor must not be loaded."""
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
    identity = "\n".join((SOURCE.read_text(), TILES.read_text(), *FLAGS, _run((compiler, "--version")), _machine()))
    path = _cache_folder() / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        # built under another name and moved: another process never sees half of it
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / "cpu.so"
            _run((compiler, *FLAGS, str(SOURCE), "-o", str(built)))
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
    if loaded.sdtrain_job_bytes() != 8 * len(COLUMNS):
        raise UnavailableError("the compiler lays structures out in an unexpected way")
    return loaded


@functools.cache
def available(*, say: bool) -> bool:
    """Whether the library works here; if not, and `say`, one warning with the reason."""
    try:
        library()
    except UnavailableError as reason:
        if say:
            warnings.warn(
                f"the optimizer's compiled step is not available, plain torch is used: {reason}", stacklevel=2
            )
        return False
    return True


def usable(stacks: list[Stack], settings: Settings) -> list[Stack]:
    """Those of which the library makes the step; none, with a warning, where it cannot be had."""
    if not supports(settings) or not available(say=True):
        return []
    return [stack for stack in stacks if supports_stack(stack, settings)]


class Table:
    """The addresses of parameters of one dtype and their state, a row each."""

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
        """Everything of a stack's rows that does not change from step to step."""
        kind, num = stack.kind, len(stack.indices)
        rows = torch.zeros(num, len(COLUMNS), dtype=torch.int64)
        for name, address in stack.addresses().items():
            rows[:, AT[name]] = address
        if kind.axes is not None:
            (A, B), K = kind.shape[:2], kind.shape[2:].numel()
        else:
            # without factors there are no rows: any cut will do
            A, B, K = kind.numel, 1, 1
        sizes = {"A": A, "B": B, "K": K, "whole_a": kind.whole[0] if kind.axes is not None else A}
        sizes |= {
            "rows": max(FEWEST_ROWS, BLOCK_ELEMENTS // max(1, B * K)),
            "offset": kind.offset,
            "whole": kind.whole.numel(),
        }
        for name, value in (sizes | {"group": kind.group}).items():
            rows[:, AT[name]] = value
        rows[:, AT["key"]] = stack.keys.to(torch.int64) & 0xFFFFFFFF
        return rows

    @staticmethod
    def _units(jobs: Tensor, blocks: Tensor) -> Tensor:
        """int64 [units, 2]: (row, block), the largest pieces of work first come first."""
        return torch.stack(numbered(torch.arange(len(jobs)), blocks), dim=1).contiguous()

    def _make_room(self) -> None:
        """Scratch for what blocks find before it is added up."""
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
        """Jobs and units of the parameters at `present` (in the order of the table), with the addresses of this
        step."""
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
        """Sums of g^2 into `stack.totals`, `row_now` and `col_now`."""
        jobs, units = self._chosen(present, params, grads)
        library().sdtrain_measure(
            jobs.data_ptr(), len(jobs), units.data_ptr(), len(units), self.bf16, torch.get_num_threads()
        )
        return Call(self, jobs, units, (*params, *grads))


class Call:
    """A step of some rows of a table, measured and not yet made."""

    def __init__(self, table: Table, jobs: Tensor, units: Tensor, alive: tuple[Tensor, ...]) -> None:
        self.table, self.jobs, self.units, self.alive = table, jobs, units, alive

    def advance(self, coefficients: Tensor, sound: Tensor, step_key: int) -> None:
        """The step itself, unless `sound` (bool, 0-dim) is False. coefficients: float32 [coefficients, groups]."""
        table, settings = self.table, self.table.settings
        by_group = coefficients.t().contiguous()
        library().sdtrain_advance(
            self.jobs.data_ptr(),
            len(self.jobs),
            self.units.data_ptr(),
            len(self.units),
            by_group.data_ptr(),
            sound.data_ptr(),
            table.bf16,
            settings.eps is None,
            settings.scales_by_rms,
            settings.stochastic_rounding,
            step_key & 0xFFFFFFFF,
            torch.get_num_threads(),
        )
