"""Operations that are remembered return what they return when called: shapes, memory they share, arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sdtrain.training.planning import tracking
from sdtrain.training.planning.replaying import Replay
from sdtrain.training.planning.tracking import Tracker

aten: Any = torch.ops.aten
CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "product": lambda x, y: x @ y,
    "sum of two types": lambda x, y: x + y.to(torch.bfloat16),
    "whole and real numbers": lambda x, y: (x.to(torch.int64) * 2, x.to(torch.int64) * 2.0, x.to(torch.int64) * True),
    "view": lambda x, y: x.view(2, -1),
    "transposed view": lambda x, y: x.t().detach()[1:],
    "parts": lambda x, y: x.split(2),
    "in place": lambda x, y: x.mul_(y),
    "into another": lambda x, y: torch.add(x, 1, out=torch.empty_like(x)),
    "in its place, another shape": lambda x, y: x.clone().transpose_(0, 1),
    "several": lambda x, y: x.max(dim=1),
    "put together": lambda x, y: torch.cat([x, y, x]),
    "attention": lambda x, y: torch.nn.functional.scaled_dot_product_attention(*(x[None, None], *[y[None, None]] * 2)),
}


def facts(out: Any, given: tuple[Tensor, ...]) -> list[Any]:
    """All that is known of tensors without numbers, and whose memory they use."""
    tensors = list(out) if isinstance(out, tuple | list) else [out]
    places = [tensor.untyped_storage()._cdata for tensor in given]
    return [type(out)] + [
        (
            type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device,
            tensor.untyped_storage().nbytes(),
            [place == tensor.untyped_storage()._cdata for place in places],
        )
        for tensor in tensors
    ]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_is_remembered_equals_what_is_computed(name: str) -> None:
    seen = []
    with FakeTensorMode():
        x, y = torch.empty(4, 4), torch.empty(4, 4)
        seen.append(facts(CALLS[name](x, y), (x, y)))
        for _ in range(3):
            x, y = torch.empty(4, 4), torch.empty(4, 4)
            with Tracker():
                seen.append(facts(CALLS[name](x, y), (x, y)))
        tracker = Tracker()
        with tracker:
            for _ in range(3):
                x, y = torch.empty(4, 4), torch.empty(4, 4)
                before = tracker.flops, tracker.bytes_now
                out = CALLS[name](x, y)
                seen.append(facts(out, (x, y)))
                cost = tracker.flops - before[0], tracker.bytes_now - before[1]
                del out
    assert seen == [seen[0]] * len(seen)
    assert name != "product" or cost == (2 * 4**3, 4 * 4 * 4)


def test_inputs_that_differ_are_told_apart() -> None:
    """By type, by where they begin, by how they lie, and by the type of a number."""
    with FakeTensorMode():
        x = torch.empty(4, 4)
        kinds = [x, x.half(), x.to(torch.int64), x[1:], x[2:], x[:, 1:], x.t(), x[:3]]

        def made() -> list[Any]:
            return [
                facts(out, (x,)) for kind in kinds for out in (kind.detach(), kind * 2, kind * 2.0, kind[1:], kind.t())
            ]

        plain = made()
        with Tracker():
            assert made() == plain and made() == plain


def test_most_operations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    plain = tracking._flops
    monkeypatch.setattr(tracking, "_flops", lambda func, *rest: (counted.append(func), plain(func, *rest))[1])
    layer = torch.nn.Linear(4, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        fake = torch.nn.Linear(4, 4)
        for _ in range(20):
            fake(torch.empty(2, 4)).square().sum().backward()
    assert layer is not fake and tracker.operations > 100
    assert len(counted) < 40


def test_tensors_with_numbers_are_never_remembered() -> None:
    replay = Replay(lambda *_: 0)
    for number in (1.0, 2.0):
        out, _ = replay.call(aten.add.Tensor, (torch.tensor(number), 1), {})
        assert out.item() == number + 1 and not isinstance(out, FakeTensor)
    assert not replay._known


class PartOfALargerOne:
    """An operation that keeps more than it returns, as kernels that pad do."""

    namespace, overloadpacket, tags = "aten", None, ()

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_empty(16)[:4]


def test_memory_beyond_what_is_returned_is_remembered() -> None:
    replay, operation = Replay(lambda *_: 0), PartOfALargerOne()
    with FakeTensorMode():
        x = torch.empty(4, 4)
        first, again = (facts(replay.call(operation, (x,), {})[0], (x,)) for _ in range(2))
    assert len(replay._known) == 1 and first == again
    assert first[1][6] == 16 * 4
