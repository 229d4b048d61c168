"""A card that nobody has: tensors on it have shapes, types and a place, and no numbers.

PyTorch's fake tensors compute what an operation would return, refuse operands on different devices, and take no memory.
Here they are given a device of their own, `fakecard`, so that on any machine a run can be seen to put its tensors where
a GPU needs them, to wait for the device no more often than it says, and to need so many bytes.

Where a run asks for a number it gets a made-up one, and that is written down: on a card the host waits there.
"""

from __future__ import annotations

import linecache
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from sdtrain.training.planning.tracking import movable_modules

NAME = "fakecard"
ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "sdtrain"), str(ROOT / "optim"))


class _Module:
    """What PyTorch asks of the module `torch.<device>`. It is there only while a test has it in use."""

    in_use = False

    @classmethod
    def is_available(cls) -> bool:
        return cls.in_use

    @classmethod
    def device_count(cls) -> int:
        return int(cls.in_use)

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.in_use

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_rng_state(*_: object) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def set_rng_state(*_: object) -> None:
        return None

    @staticmethod
    def manual_seed_all(_: int) -> None:
        return None


_registered: list[torch.device] = []


def card() -> torch.device:
    """The device; it is registered with PyTorch once a process, on first use."""
    if not _registered:
        _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module)
        _cast_under_autocast()
        _registered.append(torch.device(NAME, 0))
    return _registered[0]


CAST = ("linear", "conv2d", "addmm", "mm", "bmm", "matmul", "baddbmm", "scaled_dot_product_attention")
"""The products that CUDA's autocast computes in bfloat16 and that networks are made of."""
_library = torch.library.Library("aten", "IMPL")
_others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


def _cast_under_autocast() -> None:
    """Give the device an autocast: a new device has none, and every operation would pass through as it is."""

    def casting(operation: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operation(*map(narrow, args), **{key: narrow(value) for key, value in kwargs.items()})

        return run

    def narrow(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.device.type == NAME and value.dtype == torch.float32
        return value.to(torch.bfloat16) if wide else value

    _others.fallback(torch.library.fallthrough_kernel)
    for name in CAST:
        operation = getattr(torch.ops.aten, name)
        _library.impl(name, casting(operation), "AutocastPrivateUse1")


@dataclass(frozen=True)
class Wait:
    """One moment in which the host waited for the card: what was asked, and the line of ours that asked."""

    what: str
    file: str
    line: int

    @property
    def where(self) -> str:
        """The line itself, with its file."""
        return f"{Path(self.file).relative_to(ROOT)}: {linecache.getline(self.file, self.line).strip()}"


@dataclass
class Card:
    """What happened on the card while it was in use."""

    device: torch.device
    mode: FakeTensorMode
    waits: list[Wait] = field(default_factory=list)
    num_bytes: int = 0
    peak_bytes: int = 0
    num_operations: int = 0
    known: set[int] = field(default_factory=set)

    def note(self, what: str) -> None:
        """Write down that the host waited."""
        frame = sys._getframe()
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        self.waits.append(Wait(what, frame.f_code.co_filename, frame.f_lineno))

    def count(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, num = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.num_bytes += num
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._free, key, num)

    def _free(self, key: int, num: int) -> None:
        self.known.discard(key)
        self.num_bytes -= num


@contextmanager
def _without_numbers(args: Any, kwargs: Any) -> Iterator[None]:
    """Fake tensors remember the numbers of small ones, and would compute with them on the card, which cannot."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != NAME or not isinstance(args[0], FakeTensor):
        yield
        return
    constant, args[0].constant = args[0].constant, None
    try:
        yield
    finally:
        args[0].constant = constant


def made_up(dtype: torch.dtype) -> bool | int | float:
    """What is read from tensors without numbers: everything is finite, and the rest is zero."""
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 0


class _Watching(TorchDispatchMode):
    """Answers those who ask for numbers, and writes down when they had to wait for the card."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(func, args)
        if func is torch.ops.aten._linalg_check_errors.default and args[0].device.type == NAME:
            self.card.note("asks whether equations were solved")
        if func is torch.ops.aten.equal.default and isinstance(args[0], FakeTensor):
            if NAME in (args[0].device.type, args[1].device.type):
                self.card.note("reads a number")
            return True
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            return self._places(args[0])
        if func is torch.ops.aten._to_copy.default:
            self._copied(args[0].device, kwargs.get("device"), kwargs.get("non_blocking", False))
        elif func is torch.ops.aten.copy_.default:
            self._copied(args[1].device, args[0].device, kwargs.get("non_blocking", False) or args[2:3] == (True,))
        self.card.num_operations += 1
        with _without_numbers(args, kwargs):
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == NAME:
                self.card.count(tensor)
        return out

    def _number(self, func: Any, args: Any) -> Any:
        tensor = args[0]
        if tensor.device.type == NAME:
            self.card.note("reads a number")
        if not isinstance(tensor, FakeTensor):
            return func(*args)
        if tensor.constant is not None:
            return tensor.constant.item()
        return made_up(tensor.dtype)

    def _places(self, tensor: Tensor) -> Tensor:
        """One place, for how many there are is a number."""
        if tensor.device.type == NAME:
            self.card.note("reads a number")
        return torch.zeros(1, tensor.dim(), dtype=torch.int64, device=tensor.device)

    def _copied(self, source: torch.device, target: torch.device | None, non_blocking: bool) -> None:
        if target is None or source.type == torch.device(target).type:
            return
        if torch.device(target).type == NAME:
            if not non_blocking:
                self.card.note("copies to the card")
        elif source.type == NAME:
            self.card.note("copies from the card")


def _numpy(self: Tensor, **_: Any) -> np.ndarray[Any, Any]:
    """What gives the CPU's bytes away, to files and pictures: zeros, for a tensor that has none."""
    if not isinstance(self, FakeTensor):
        return plain_numpy(self)
    if self.device.type == NAME:
        raise TypeError("can't convert a tensor on the card to numpy; copy it to the CPU first")
    return np.zeros(tuple(self.shape), dtype=str(self.dtype).removeprefix("torch."))


plain_numpy = Tensor.numpy


@contextmanager
def card_in_use() -> Iterator[Card]:
    """A machine with the card. Every tensor that is made in the block is without numbers, wherever it lies."""
    device = card()
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        found = Card(device, mode)
        stack.enter_context(_Watching(found))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a device has a thread without our modes
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(movable_modules())
        patch.setattr(Tensor, "numpy", _numpy)
        _Module.in_use = True
        try:
            yield found
        finally:
            _Module.in_use = False
