"""Counts the bytes of all tensors while a block runs, and its arithmetic; for fake tensors as for real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sdtrain.training.planning.replaying import Replay

aten: Any = torch.ops.aten
prim: Any = torch.ops.prim
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, from where it begins until they are freed.

    bytes_now, peak_bytes: what is held, and the most that was since `begin_peak`. flops: as PyTorch's own counter has
    them, two for a multiplication with an addition. operations: how many there were, which a processor launches.

    on_gpu: whether convolutions are counted as cuDNN makes them there: tensor cores want the channels last, so what a
    convolution reads and what it makes are held a second time while it runs. Measured on an H100: a preview of SDXL at
    1024 px took 10.46 GiB, of which the tensors alone are 8.6.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_gpu = on_gpu
        self.bytes_now = self.peak_bytes = self.flops = self.operations = 0
        self._held: dict[int, int] = {}
        self._zeros: set[int] = set()
        self._replay = Replay(_flops)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors that are there already, even where an operation returns a view of them."""
        for tensor in tensors:
            self._hold(tensor, 0)

    def begin_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.bytes_now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is prim.device.default and isinstance(args[0], FakeTensor):  # more often than all else together
            self.operations += 1  # what an operation is said to cost was measured with these among them
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _made_up(args[0])
        if func is aten.count_nonzero.default and isinstance(args[0], FakeTensor):
            return _real(int(_key(args[0]) not in self._zeros))
        if func is aten.stack.default and not any(isinstance(tensor, FakeTensor) for tensor in args[0]):
            with _disable_current_modes():
                return func(*args, **kwargs)
        out, flops = self._replay.call(func, args, kwargs)
        self.operations += 1
        self.flops += flops
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._hold(tensor, None)
                if func is aten.zeros.default:
                    self._zeros.add(_key(tensor))
        if self.on_gpu and func in CONVOLUTIONS:
            copied = args[0].nbytes + max(tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
            self.peak_bytes = max(self.peak_bytes, self.bytes_now + copied)
        return out

    def _hold(self, tensor: Tensor, num_bytes: int | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes() if num_bytes is None else num_bytes
        self.bytes_now += self._held[key]
        self.peak_bytes = max(self.peak_bytes, self.bytes_now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.bytes_now -= self._held.pop(key)
        self._zeros.discard(key)


@contextmanager
def movable_modules() -> Iterator[None]:
    """Let modules be moved whose parameters are fake.

    PyTorch puts the moved parameter into the old one's place, which a fake one refuses; here it takes over its name.
    """
    plain = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = plain  # type: ignore[method-assign]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for module in self.modules() if recurse else (self,):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = fn(parameter.detach())
                same = moved.device == parameter.device and moved.dtype == parameter.dtype
                module._parameters[name] = parameter if same else nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return self


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _real(number: int) -> Tensor:
    with _disable_current_modes():
        return torch.tensor(number)


def _made_up(tensor: FakeTensor) -> Any:
    """What is read from a tensor without numbers: steps are finite, and nothing decays."""
    if tensor.constant is not None:
        return tensor.constant.item()
    return {torch.bool: True, torch.int64: 1}.get(tensor.dtype, 0.0)
