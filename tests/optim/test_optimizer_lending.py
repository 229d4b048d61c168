"""Lending: inside `averaged` the model holds x, afterwards y's exact bits."""

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree, averaged

DTYPES = (torch.float32, torch.bfloat16)


def trained(dtype: torch.dtype, steps: int = 30) -> tuple[list[nn.Parameter], ProdigyPlusScheduleFree]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 48), (40, 8), (8, 4, 3, 3), (7,), ()]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = ProdigyPlusScheduleFree(params, d0=1e-3)
    for _ in range(steps):
        for p in params:
            p.grad = (p.detach().float() + 0.1 * torch.randn(p.shape, generator=generator)).to(dtype)
        optimizer.step()
    return params, optimizer


def bits(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_holds_x_inside_and_the_bits_of_y_afterwards(dtype: torch.dtype) -> None:
    params, optimizer = trained(dtype)
    before = bits(params)
    with averaged(optimizer):
        for p, y in zip(params, before, strict=True):
            z = optimizer.state[p]["z"].double().view(p.shape)
            x = y.double() + (1 - 1 / 0.9) * (z - y.double())
            rtol = 4e-3 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(p.detach().double(), x, rtol=rtol, atol=1e-6)
            assert not torch.equal(p.detach(), y) or p.numel() < 10
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_come_back_after_an_exception(dtype: torch.dtype) -> None:
    params, optimizer = trained(dtype)
    before = bits(params)
    with pytest.raises(KeyError), averaged(optimizer):
        params[0].data.zero_()
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params), strict=True))
    assert not optimizer.holds_average


def test_step_inside_is_refused_and_changes_nothing() -> None:
    params, optimizer = trained(torch.float32)
    with averaged(optimizer):
        inside = bits(params)
        params[0].grad = torch.ones_like(params[0])
        with pytest.raises(RuntimeError, match="averaged weights"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(inside, bits(params), strict=True))
    optimizer.step()


def test_lending_twice_is_lending_once() -> None:
    params, optimizer = trained(torch.float32)
    before = bits(params)
    with averaged(optimizer):
        inside = bits(params)
        with averaged(optimizer):
            assert all(torch.equal(a, b) for a, b in zip(inside, bits(params), strict=True))
        assert optimizer.holds_average
        assert all(torch.equal(a, b) for a, b in zip(inside, bits(params), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_and_train_are_exact_too(dtype: torch.dtype) -> None:
    params, optimizer = trained(dtype)
    before = bits(params)
    for _ in range(3):
        optimizer.eval()
        optimizer.eval()
        optimizer.train()
        optimizer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, bits(params), strict=True))


def test_looking_at_x_does_not_change_the_training() -> None:
    plain, _ = trained(torch.bfloat16, steps=20)
    generator = torch.Generator().manual_seed(1)
    shapes = [tuple(p.shape) for p in plain]
    params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    optimizer = ProdigyPlusScheduleFree(params, d0=1e-3)
    for _ in range(20):
        for p in params:
            p.grad = (p.detach().float() + 0.1 * torch.randn(p.shape, generator=generator)).bfloat16()
        optimizer.step()
        with averaged(optimizer):
            optimizer.metrics()
    assert all(torch.equal(a, b) for a, b in zip(plain, params, strict=True))


def test_without_schedule_free_there_is_nothing_to_lend_but_step_is_refused_all_the_same() -> None:
    p = nn.Parameter(torch.randn(4, 40))
    optimizer = ProdigyPlusScheduleFree([p], use_schedulefree=False)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    with averaged(optimizer):
        assert torch.equal(p.detach(), before)
        with pytest.raises(RuntimeError, match="averaged weights"):
            optimizer.step()
