"""The CUDA path: without a device its kernels are interpreted, slowly, on the CPU, and compiled for cards that are not
here; with one (mark `gpu`) they run there."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import ProdigyPlusScheduleFree, stepper
from optim.steps import cuda, trial
from tests.conftest import one_in
from tests.optim.small_runs import unnoticed_by_trial

has_triton = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not has_triton or os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not at hand"
)
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [(16, 48), (48, 16), (32, 2, 3, 3), (7,), (), (33, 34), (40, 5, 36), (0, 40)]
ZEROS = (1, 5)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "eps": {"eps": 1e-8},
    "eps without StableAdamW": {"eps": 1e-8, "use_stableadamw": False},
    "not factored": {"factored": False},
    "weight decay": {"weight_decay": 0.1},
    "weight decay apart": {"weight_decay": 1e-3, "weight_decay_by_lr": False},
    "frozen": {"prodigy_steps": 2},
    "rounded to the nearest": {"stochastic_rounding": False},
}
ROUNDED = ("default", "eps", "not factored", "rounded to the nearest")


@pytest.fixture
def tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels make the compiled step of CPU parameters, too."""
    monkeypatch.setitem(stepper.COMPILED, "cpu", cuda)
    cuda._reason_against.cache_clear()
    trial.warn_once.cache_clear()


@pytest.fixture
def on_kernels(tried_first: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, without trying them first, which takes the interpreter seconds."""
    monkeypatch.setattr(cuda, "_reason_against", lambda *_: "")


def build(
    compile_step: bool, dtype: torch.dtype, device: str = "cpu", **settings: Any
) -> tuple[list[nn.Parameter], ProdigyPlusScheduleFree]:
    generator = torch.Generator().manual_seed(11)
    values = [torch.randn(shape, generator=generator) * (0.0 if i in ZEROS else 0.3) for i, shape in enumerate(SHAPES)]
    params = [nn.Parameter(value.to(device, dtype)) for value in values]
    groups = [{"params": params[:4], "name": "unet"}, {"params": params[4:], "name": "text", "lr": 0.5}]
    return params, ProdigyPlusScheduleFree(groups, compile=compile_step, **{"d0": 1e-4, **settings})


def gradient(p: Tensor, step: int, index: int) -> Tensor:
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + index))
    return 0.02 * (p.detach() - 1.0) + 0.01 * noise.to(p)


def assert_kernels_follow_plain(settings: dict[str, Any], dtype: torch.dtype, device: str, num_steps: int) -> None:
    results = []
    for compile_step in (False, True):
        params, optimizer = build(compile_step, dtype, device, **settings)
        for step in range(num_steps):
            for index, p in enumerate(params):
                p.grad = gradient(p, step, index)
            optimizer.step()
        assert [type(table) for table in optimizer._stepper.tables or []] == [cuda.Table] * compile_step
        numbers = torch.tensor([[m.d, m.effective_lr, m.k] for m in optimizer.metrics()])
        results.append((params, [optimizer.state[p] for p in params], numbers))
    (plain, plain_state, plain_numbers), (kernels, kernel_state, kernel_numbers) = results
    torch.testing.assert_close(kernel_numbers, plain_numbers, rtol=2e-3, atol=0)
    for p, q, one, two in zip(plain, kernels, plain_state, kernel_state, strict=True):
        # a float32's last bit decides now and then which bfloat16 something is rounded to
        atol = 1e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(q.detach(), p.detach(), rtol=0, atol=atol)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name].float(), one[name].float(), rtol=1e-2, atol=atol)
    starts = list(build(False, dtype, device)[0])
    apart, moved = (
        sum(float((p.detach().float() - q.detach().float()).abs().sum()) for p, q in zip(plain, others, strict=True))
        for others in (kernels, starts)
    )
    assert apart <= 1e-2 * moved


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"), one_in(2, [*product(SETTINGS, [torch.float32]), *product(ROUNDED, [torch.bfloat16])])
)
def test_the_kernels_follow_the_plain_path(on_kernels: None, name: str, dtype: torch.dtype) -> None:
    assert_kernels_follow_plain(SETTINGS[name], dtype, "cpu", num_steps=3)


@interpreted
@pytest.mark.parametrize("shape", [(300, 40), (10, 700), (20, 40, 3, 3), (5000,), (140, 16)])
def test_tensors_of_several_units_follow_the_plain_path(shape: tuple[int, ...]) -> None:
    from optim.formulas.second_moment import factored_axes
    from optim.steps.stacks import Kind
    from optim.steps.trial import difference

    size = torch.Size(shape)
    settings = build(False, torch.float32, eps=1e-8)[1].settings
    kind = Kind(0, size, size, None, 0, torch.float32, factored_axes(size), False)
    assert difference([kind], settings, torch.device("cpu"), cuda.Table) < 1e-6


@interpreted
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("atan2", torch.bfloat16),
        pytest.param("eps, decay apart", torch.float32, marks=pytest.mark.slow),
        pytest.param("not factored", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_trial_on_copies_notices_a_coefficient_that_is_10_percent_off(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unnoticed_by_trial(cuda, name, [(16, 48), (33, 3, 2)], dtype, monkeypatch) == ["none"]


@interpreted
def test_fused_is_not_fused_to_the_bit(on_kernels: None) -> None:
    results = []
    for fused in (False, True):
        params, optimizer = build(True, torch.bfloat16, fused_back_pass=fused)
        for step in range(3):
            chosen = [p for index, p in enumerate(params) if (step, index) != (1, 1)]  # one has no gradient, once
            sum((gradient(p, step, i) * p).sum() for i, p in enumerate(chosen)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        results.append([*params, *(optimizer.state[p]["z"] for p in params), torch.tensor(optimizer.metrics()[0].d)])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@interpreted
def test_gradients_that_are_not_finite_leave_no_trace(on_kernels: None) -> None:
    params, optimizer = build(True, torch.float32, weight_decay=0.1)
    for step in range(2):
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        if step == 1:
            params[2].grad[3, 1, 0, 0] = float("nan")  # type: ignore[index]
            before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.step()
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert optimizer.metrics()[0].skipped == 1


@interpreted
def test_gradients_that_are_laid_out_otherwise_are_read_right(on_kernels: None) -> None:
    results = []
    for strange in (False, True):
        params, optimizer = build(True, torch.float32)
        for step in range(3):
            for index, p in enumerate(params):
                p.grad = gradient(p, step, index)
                if strange and p.dim() == 2:
                    p.grad = p.grad.t().contiguous().t()
                elif strange and p.dim() == 1:  # not on a whole 16 bytes
                    p.grad = torch.cat((p.grad[:1], p.grad))[1:]
            optimizer.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@interpreted
@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_kernels_that_go_wrong_touch_no_weight(tried_first: None, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: cuda.Call, coefficients: Tensor, all_finite: Tensor, step_key: int) -> None:
        if fault == "raises":
            raise RuntimeError("PTX was compiled for another card")

    plain, optimizer = build(False, torch.float32)
    gives = [gradient(p, 0, index) for index, p in enumerate(plain)]
    monkeypatch.setattr(cuda.Call, "advance", broken)
    params, other = build(True, torch.float32)
    message = "another card" if fault == "raises" else "differ from plain torch's"
    with pytest.warns(UserWarning, match=message) as said:
        for chosen, its in ((plain, optimizer), (params, other)):
            for p, g in zip(chosen, gives, strict=True):
                p.grad = g.clone()
            its.step()
            its.step()
    assert sum(message in str(one.message) for one in said) == 1  # Triton 3.4's interpreter has warnings of its own
    assert all(torch.equal(p, q) for p, q in zip(plain, params, strict=True))


class Launches(TorchDispatchMode):
    """Counts operations that are not views, and stands in for the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not any(part in func.__name__ for part in ("view", "detach", "alias", "select", "slice", "unbind"))
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        assert len(grid) == 1 and grid[0] > 0
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self.num += 1


@interpreted
def test_a_step_of_a_lora_of_sdxl_is_at_most_300_launches(on_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    kernels = cuda.kernels()
    for name in ("measure_units", "gather_factors", "reduce_units", "blend_columns", "blend_rows", "advance_units"):
        monkeypatch.setattr(kernels, name, launches)
    widths = [640] * 10 + [1280] * 60
    shapes = [shape for w in widths for fan_in in (w, w, w, w, w, 2048, 2048, w) for shape in ((16, fan_in), (w, 16))]
    assert len(shapes) == 1120
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = ProdigyPlusScheduleFree([{"params": params[:560]}, {"params": params[560:]}], compile=True)
    optimizer.step()
    launches.num = 0
    with launches:
        optimizer.step()
    assert 10 < launches.num <= 300


@pytest.mark.slow
@pytest.mark.skipif(not has_triton, reason="there is no Triton here")
def test_the_kernels_compile_for_cards_that_are_not_here() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), "80", "90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["80:", "13", "90:", "13"]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_on_a_device_the_kernels_follow_the_plain_path(name: str, dtype: torch.dtype) -> None:
    assert_kernels_follow_plain(SETTINGS[name], dtype, "cuda", num_steps=20)


@pytest.mark.gpu
@needs_device
def test_on_a_device_a_step_does_not_wait_for_it() -> None:
    params, optimizer = build(True, torch.bfloat16, "cuda")
    for step in range(3):
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
