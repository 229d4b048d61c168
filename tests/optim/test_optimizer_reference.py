"""Reference: the plain path follows the float64 definition, and the compiled path follows the plain one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optim import ProdigyPlusScheduleFree
from optim.reference import Reference
from optim.steps import cpu

SHAPES = [(16, 48), (48, 16), (40, 8, 3, 3), (8, 40, 3, 3), (40, 5, 36), (7,), (), (3, 5), (1, 64), (64, 1), (33, 34)]
ZEROS = (1, 6)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "own d": {"split_groups_mean": None},
    "geometric mean": {"split_groups_mean": "geometric_mean"},
    "mean": {"split_groups_mean": "mean"},
    "joint d": {"split_groups": False},
    "beta4 up and down": {"beta4": 0.9},
    "beta4 on the way down": {"beta4": -0.9},
    "beta4 as beta2": {"beta4": None},
    "frozen": {"prodigy_steps": 12},
    "d_coef": {"d_coef": 2.0},
    "d0": {"d0": 1e-5},
    "no limiter": {"d_limiter": False, "d0": 1e-4},
    "eps": {"eps": 1e-8},
    "eps without StableAdamW": {"eps": 1e-8, "use_stableadamw": False},
    "not factored": {"factored": False},
    "not factored, eps": {"factored": False, "eps": 1e-8},
    "refined averaging": {"schedulefree_c": 8.0},
    "weight decay": {"weight_decay": 0.1},
    "weight decay apart": {"weight_decay": 1e-3, "weight_decay_by_lr": False},
    "bias correction": {"use_bias_correction": True},
    "speed": {"use_speed": True},
    "first moment": {"use_schedulefree": False},
    "first moment, decay": {"use_schedulefree": False, "weight_decay": 0.1},
    "betas": {"betas": (0.95, 0.98), "beta3": 0.97},
}
COMPILED = [name for name, s in SETTINGS.items() if "use_speed" not in s and s.get("use_schedulefree", True)]


def starts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    values = [torch.randn(shape, generator=generator) * 0.3 for shape in SHAPES]
    for index in ZEROS:
        values[index].zero_()
    return values


def gradient(y: Tensor, step: int, index: int) -> Tensor:
    """Of a bowl around 1, with noise; the same for all paths as long as y is."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(y.shape, generator=generator)
    return 0.02 * (y.float() - 1.0) + 0.01 * noise


def build(values: list[Tensor], compile_step: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[
    list[nn.Parameter], ProdigyPlusScheduleFree
]:  # fmt: skip
    params = [nn.Parameter(value.clone().to(dtype)) for value in values]
    groups = [{"params": params[:5], "name": "unet"}, {"params": params[5:], "name": "text", "lr": 0.5}]
    return params, ProdigyPlusScheduleFree(groups, compile=compile_step, **{"d0": 1e-4, **settings})


def assert_follows_reference(settings: dict[str, Any], compile_step: bool, num_steps: int = 25) -> None:
    values = starts()
    params, optimizer = build(values, compile_step, **settings)
    reference = Reference([values[:5], values[5:]], optimizer.settings, lr=[1.0, 0.5])
    for step in range(num_steps):
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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_plain_path_follows_the_reference(settings: dict[str, Any]) -> None:
    assert_follows_reference(settings, compile_step=False)


needs_compiler = pytest.mark.skipif(not cpu.available(say=False), reason="no working C++ compiler")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_path_follows_the_plain_one(name: str, dtype: torch.dtype) -> None:
    settings = SETTINGS[name]
    results = []
    for compile_step in (False, True):
        params, optimizer = build(starts(), compile_step, dtype, **settings)
        for step in range(20):
            for index, p in enumerate(params):
                p.grad = gradient(p.detach(), step, index).to(dtype)
            optimizer.step()
        assert bool(optimizer._stepper.tables) == compile_step
        results.append((params, [m.d for m in optimizer.metrics()]))
    (plain, plain_d), (compiled, compiled_d) = results
    # where d runs away, a last bit of float32 that tips a bfloat16 of Prodigy's sums is felt in every weight
    far = name in ("d_coef", "no limiter")
    torch.testing.assert_close(torch.tensor(compiled_d), torch.tensor(plain_d), rtol=1e-2 if far else 2e-3, atol=0)
    for start, p, q in zip(starts(), plain, compiled, strict=True):
        # in bfloat16 a float32's last bit decides now and then which neighbour a weight is rounded to
        # and, in either, whether a bfloat16 of Prodigy's sums tips
        more = (p.detach() - start).abs().max().item() if far else 0.0
        atol = 0.1 * more + (1e-3 if dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(q.detach(), p.detach(), rtol=0, atol=atol)
        mean = (p.float() - q.float()).abs().mean()
        assert mean < 5e-3 * more + 2e-4 + (2e-3 if dtype == torch.bfloat16 else 0)


@needs_compiler
@pytest.mark.parametrize(
    "shape", [(300, 1300), (1300, 30), (90, 40, 3, 3), (40, 90, 3, 3), (33, 64, 5, 5), (5, 8000), (70_000,)]
)
@pytest.mark.parametrize("eps", [None, 1e-8])
def test_tensors_of_several_blocks_follow_the_plain_path(shape: tuple[int, ...], eps: float | None) -> None:
    results = []
    for compile_step in (False, True):
        p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        optimizer = ProdigyPlusScheduleFree([p], d0=1e-3, eps=eps, compile=compile_step)
        for step in range(4):
            p.grad = gradient(p.detach(), step, 0)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-6)


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


@needs_compiler
def test_the_compiled_path_gives_the_same_bits_on_any_number_of_threads() -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params, optimizer = build([*starts(), torch.ones(300, 700)], True, weight_decay=0.1)
        for step in range(3):
            for index, p in enumerate(params):
                p.grad = gradient(p.detach(), step, index)
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
