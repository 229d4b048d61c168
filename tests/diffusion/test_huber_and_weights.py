"""Errors, their schedules and weights, and rescaled guidance, against the same formulas in float64, written anew."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.diffusion.guidance import rescaled_guidance
from sdtrain.diffusion.loss import error_per_image, huber_deltas, timestep_weights
from sdtrain.diffusion.schedule import NoiseSchedule, betas_of, schedule_of_betas
from sdtrain.diffusion.words import HuberSchedule, Weighting

DELTAS = st.floats(1e-3, 2.0)
NUM = 1000


def sdxl(zero_terminal_snr: bool = False) -> NoiseSchedule:
    return schedule_of_betas(betas_of("scaled_linear", 0.00085, 0.012, NUM), zero_terminal_snr=zero_terminal_snr)


def deltas(kind: HuberSchedule, delta: float, *, zero: bool = False, num: int = NUM) -> np.ndarray:
    found = huber_deltas(sdxl(zero), torch.arange(num), kind=kind, delta=delta)
    assert found.shape == (num,) and found.dtype == torch.float64
    return found.numpy()


def alphas_cumprod() -> np.ndarray:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, NUM) ** 2
    return np.cumprod(1 - betas)


@given(DELTAS)
def test_the_exponential_schedule_falls_evenly_in_the_logarithm(delta: float) -> None:
    expected = [math.exp(math.log(delta) * t / NUM) for t in range(NUM)]
    np.testing.assert_allclose(deltas("exponential", delta), expected, rtol=1e-9)


@given(DELTAS)
def test_the_snr_schedule_follows_the_noise(delta: float) -> None:
    signal = alphas_cumprod()
    sigmas = np.sqrt((1 - signal) / signal)
    expected = (1 - delta) / (1 + sigmas) ** 2 + delta
    np.testing.assert_allclose(deltas("snr", delta), expected, rtol=2e-4)  # alphas_cumprod is float32 there


def test_the_schedules_have_the_values_people_know() -> None:
    """sd-scripts with `huber_c` 0.1, measured."""
    np.testing.assert_allclose(deltas("snr", 0.1)[[0, 300, 700, 999]], [0.95, 0.37, 0.15, 0.10], atol=0.005)
    assert set(deltas("constant", 0.1)) == {0.1}
    assert deltas("exponential", 0.1)[0] == 1
    assert deltas("snr", 0.1, zero=True)[-1] == 0.1


@given(
    error=st.floats(-30, 30),
    delta=DELTAS,
)
def test_errors_are_their_formulas(error: float, delta: float) -> None:
    target = torch.zeros(1, 1, 1, 1)
    distance = error**2 / (math.sqrt(error**2 + delta**2) + delta)  # sqrt(e^2 + d^2) - d without cancellation
    expected = {"l2": error**2, "l1": abs(error), "huber": 2 * delta * distance, "smooth_l1": 2 * distance}
    for kind, value in expected.items():
        found = error_per_image(target + error, target, kind=kind, huber_delta=delta)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(value, rel=1e-4, abs=4e-7 * max(1.0, delta))


def test_each_picture_has_its_own_delta_and_one_for_all_is_the_same_bits() -> None:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros_like(noise)
    own = error_per_image(noise, target, kind="huber", huber_delta=torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64))
    for index, delta in enumerate((0.1, 0.5, 2.0)):
        same = torch.full((3,), delta, dtype=torch.float64)
        alone = error_per_image(noise, target, kind="huber", huber_delta=delta)
        assert torch.equal(alone, error_per_image(noise, target, kind="huber", huber_delta=same))
        assert own[index] == alone[index]
        plain = 2 * delta * ((noise.square() + delta**2).sqrt() - delta)
        assert torch.equal(alone, plain.flatten(1).mean(dim=1))


def weights(snr: torch.Tensor, prediction: str, weighting: str) -> torch.Tensor:
    return timestep_weights(snr, prediction=prediction, weighting=weighting, min_snr_gamma=5.0)  # type: ignore[arg-type]


@given(st.floats(1e-3, 5e3))
def test_kohyas_weights_are_kohyas(ratio: float) -> None:
    snr = torch.tensor([ratio])
    counted = min(ratio, 1000)
    assert float(weights(snr, "v_prediction", "debiased_kohya")) == pytest.approx(1 / (counted + 1), rel=1e-5)
    assert float(weights(snr, "epsilon", "debiased_kohya")) == pytest.approx(counted**-0.5, rel=1e-5)


@given(st.floats(1e-3, 5e3))
def test_a_v_error_scaled_like_noise_is_the_noises_error(ratio: float) -> None:
    """An error e in x_0 is an epsilon error of SNR e and a v error of (SNR + 1) e."""
    found = float(weights(torch.tensor([ratio]), "v_prediction", "scale_v_like_noise"))
    assert found * (ratio + 1) == pytest.approx(ratio, rel=1e-5)


def test_debiased_is_the_papers_and_kohyas_is_another_weight_for_v() -> None:
    snr = torch.tensor([0.01, 1.0, 100.0])
    ours, kohyas = (weights(snr, "v_prediction", name) for name in ("debiased", "debiased_kohya"))
    assert ours[0] < 0.2 < 0.9 < kohyas[0], "at much noise: opposite emphasis"
    assert ours[2] > 0.09 > 0.01 > kohyas[2]


def test_v_is_scaled_like_noise_and_nothing_else_is() -> None:
    with pytest.raises(ValueError, match="not of epsilon"):
        weights(torch.ones(1), "epsilon", "scale_v_like_noise")


def test_only_the_weightings_that_say_so_train_pure_noise() -> None:
    """What the note before a run says."""
    from sdtrain.commands.notes import WEIGHS_NOISE

    found = {name for name in get_args(Weighting) if weights(torch.zeros(1), "v_prediction", name) > 0}
    assert found == set(WEIGHS_NOISE)


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_rescaled_guidance_is_the_papers_equations(share: float, seed: int) -> None:
    """Equations 15 and 16 of arXiv 2305.08891, picture by picture in float64."""
    generator = torch.Generator().manual_seed(seed)
    positive, guided = (torch.randn(2, 4, 8, 8, generator=generator) * scale + 0.3 for scale in (0.7, 3.0))
    found = rescaled_guidance(guided, positive, share).numpy()
    for index in range(2):
        one, other = guided[index].double().numpy(), positive[index].double().numpy()
        rescaled = one * (other.std(ddof=1) / one.std(ddof=1))
        np.testing.assert_allclose(found[index], share * rescaled + (1 - share) * one, rtol=1e-4, atol=1e-5)
