"""Reference: the plain path follows the float64 definition."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree
from optim.reference import Reference
from tests.optim.small_runs import SETTINGS, build, gradient, starts


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_plain_path_follows_the_reference(settings: dict[str, Any]) -> None:
    values = starts()
    params, optimizer = build(values, False, **settings)
    reference = Reference([values[:5], values[5:]], optimizer.settings, lr=[1.0, 0.5])
    for step in range(25):
        grads = [gradient(p.detach(), step, index) for index, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        reference.step([grads[:5], grads[5:]])
    found = [m.d for m in optimizer.metrics()]
    # s and |s|_1 are rounded to bfloat16: the last bit of one of them may fall the other way
    torch.testing.assert_close(torch.tensor(found), torch.tensor(reference.d), rtol=2e-3, atol=0)
    tensors = [tensor for group in reference.groups for tensor in group]
    for p, value, tensor in zip(params, values, tensors, strict=True):
        moved = (tensor.y - value.double()).abs().max().item()
        assert moved > 1e-5, "a test in which nothing moves shows nothing"
        torch.testing.assert_close(p.detach().double(), tensor.y, rtol=1e-6, atol=1e-2 * moved + 1e-6)
        z = optimizer.state[p]["z"].double().view(p.shape)
        torch.testing.assert_close(z, tensor.z, rtol=1e-6, atol=1e-2 * max(moved, tensor.z.abs().max().item()) + 1e-6)


def test_every_setting_changes_something() -> None:
    """A setting that did nothing would give another's weights. (For beta4 on the way down see
    test_optimizer_step_size.)"""
    outcomes: dict[str, Tensor] = {}
    for name, settings in SETTINGS.items():
        params, optimizer = build(starts()[:6], False, **settings)
        for step in range(14):
            for index, p in enumerate(params):
                p.grad = gradient(p.detach(), step, index)
            optimizer.step()
        outcomes[name] = torch.cat([p.detach().reshape(-1) for p in params])
    names = [name for name in outcomes if name != "beta4 on the way down"]
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert not torch.equal(outcomes[name], outcomes[other]), f"{name} and {other} give the same weights"


@pytest.mark.parametrize("shape", [(12, 64), (64, 12), (64, 12, 3, 3), (12, 64, 3, 3)])
def test_factors_are_exact_for_a_gradient_of_rank_one(shape: tuple[int, ...]) -> None:
    """Tall and wide: g = a b^T has g^2 = R C / mean exactly, so factored and full steps agree."""
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(shape[0], *(1 for _ in shape[1:]), generator=generator)
    right = torch.randn(1, *shape[1:], generator=generator)
    results = []
    for factored in (True, False):
        p = nn.Parameter(torch.ones(shape))
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-3, factored=factored)
        for _ in range(5):
            p.grad = left * right
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
