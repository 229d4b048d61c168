"""Operations on fake tensors, worked out once for each kind of input.

A U-Net makes the same few hundred operations ten thousands of times. PyTorch remembers what they return, too, but takes
longer to look it up than to make the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

aten: Any = torch.ops.aten
SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
OTHERWISE = (aten.set_, aten.resize_, aten._local_scalar_dense, aten.count_nonzero, aten.lift, aten.lift_fresh)
"""What changes the shape of what it is given, or depends on its numbers."""
UNFIT = (torch.Tag.inplace_view, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True)
class _Out:
    """A tensor that is returned: the input at a place itself, a view of it, or a new one with so many bytes."""

    given: int | None
    is_view: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    num_bytes: int


@dataclass(frozen=True)
class _Known:
    outs: tuple[_Out, ...]
    shape: Callable[[list[Tensor]], Any]
    flops: int


class Replay:
    """Calls operations, or makes what they returned when they were called with tensors of the same kinds."""

    def __init__(self, count: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]) -> None:
        """count: returns the arithmetic of an operation, by what it was given and what it returned."""
        self._count = count
        self._known: dict[Any, _Known | None] = {}

    def call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, int]:
        """Return what an operation returns, and its floating point operations."""
        given: list[FakeTensor] = []
        key = _key((args, tuple(kwargs.items())), given)
        if key is not None:
            key = (func, key)
            known = self._known.get(key)
            if known is not None:
                return known.shape([_made(out, given) for out in known.outs]), known.flops
        out = func(*args, **kwargs)
        flops = self._count(func, args, kwargs, out)
        if key is not None and key not in self._known:
            self._known[key] = _known(func, given, out, flops)
        return out, flops


def _key(value: Any, given: list[FakeTensor]) -> Any:
    """Return all that an operation's result follows from, or None; its tensors are put into `given`."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            return None
        given.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if kind is tuple or kind is list:
        keys = []
        for each in value:
            key = _key(each, given)
            if key is None:
                return None
            keys.append(key)
        return tuple(keys)
    return (kind, value) if kind in SIMPLE else None  # 1, 1.0 and True are equal, and mean different types


def _known(func: Any, given: Sequence[FakeTensor], out: Any, flops: int) -> _Known | None:
    """Return what is remembered of a call; None where it may not be."""
    if func.namespace != "aten" or func.overloadpacket in OTHERWISE or any(tag in func.tags for tag in UNFIT):
        return None
    tensors = list(out) if isinstance(out, tuple | list) else [out]
    outs = [_out(tensor, given) for tensor in tensors]
    fresh = [_storage(tensor) for tensor, known in zip(tensors, outs, strict=True) if known and known.given is None]
    if not all(outs) or len(set(fresh)) < len(fresh):
        return None
    shape: Callable[[list[Tensor]], Any] = type(out) if isinstance(out, tuple | list) else _only
    return _Known(tuple(filter(None, outs)), shape, flops)


def _out(tensor: Any, given: Sequence[FakeTensor]) -> _Out | None:
    if type(tensor) is not FakeTensor or tensor.constant is not None:
        return None
    same = [place for place, each in enumerate(given) if each is tensor]
    viewed = [place for place, each in enumerate(given) if _storage(each) == _storage(tensor)]
    if viewed and not same and len(given) > 1:
        return None
    return _Out(
        given=next(iter(same or viewed), None),
        is_view=not same,
        shape=tensor.shape,
        stride=tensor.stride(),
        offset=int(tensor.storage_offset()),
        dtype=tensor.dtype,
        device=tensor.fake_device,
        num_bytes=tensor.untyped_storage().nbytes(),
    )


def _made(out: _Out, given: Sequence[FakeTensor]) -> Tensor:
    if out.given is None:
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(out.shape, out.stride, dtype=out.dtype, device="meta")
            storage = meta.untyped_storage()
            if storage.nbytes() != out.num_bytes:
                storage.resize_(out.num_bytes)
        return FakeTensor(given[0].fake_mode if given else _mode(), meta, out.device)
    if not out.is_view:
        return given[out.given]
    viewed = given[out.given]
    with torch._C._DisableTorchDispatch():
        meta = aten.view.dtype(viewed, out.dtype) if viewed.dtype != out.dtype else viewed
        meta = meta.as_strided(out.shape, out.stride, out.offset)
    return FakeTensor(viewed.fake_mode, meta, out.device)


def _mode() -> Any:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
