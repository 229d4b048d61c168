"""A CUDA graph without a card: operations are written down once, and done again on the tensors that they had then.

So it is with a graph: addresses stay, numbers that Python knew stay, and who asks for a number of the card fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Recorded:
    """Stands for `graphs.captured`. num_made: the graphs. num_replayed: how often one was launched."""

    num_made: int = 0
    num_replayed: int = 0
    fails_from: int = 0
    """From which graph on they cannot be made, counted from 1; 0: never."""
    error: str = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def captured(self, compute: Callable[[], Tensor], pool: object) -> tuple[Tensor, Callable[[], None], object]:
        """Write down what is computed. As on a card, nothing is changed by that."""
        self.num_made += 1
        if self.fails_from and self.num_made >= self.fails_from:
            raise RuntimeError(self.error)
        with _Recorder() as recorder:
            loss = compute()
        with torch.no_grad():
            for tensor, before in recorder.changed:
                tensor.copy_(before)
            loss.fill_(float("nan"))

        def replay() -> None:
            self.num_replayed += 1
            for operation in recorder.operations:
                operation.again()

        return loss, replay, pool or object()


@dataclass
class _Operation:
    func: Any
    args: Any
    kwargs: Any
    out: Any

    @torch.no_grad()
    def again(self) -> None:
        out = self.func(*self.args, **self.kwargs)
        if not self.func._schema.is_mutable:
            for old, new in zip(_tensors(self.out), _tensors(out), strict=True):
                old.copy_(new)


@dataclass
class _Recorder(TorchDispatchMode):
    operations: list[_Operation] = field(default_factory=list)
    changed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    made: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was asked for while a graph was made"
        mutable = func._schema.is_mutable
        if mutable:
            for tensor in _tensors([args, kwargs]):
                if tensor.untyped_storage()._cdata not in self.made:
                    self.changed.append((tensor, tensor.clone()))
        before = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        out = func(*args, **kwargs)
        places = {tensor.untyped_storage()._cdata for tensor in _tensors(out)}
        if mutable or not places <= before:  # a view is where it was
            self.operations.append(_Operation(func, args, kwargs, out))
        self.made |= places - before
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
