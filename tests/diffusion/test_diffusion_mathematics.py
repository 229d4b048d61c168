"""The mathematics against diffusers' own schedulers and against sums done by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.diffusion.loss import error_per_image, timestep_weights
from sdtrain.diffusion.noise import draw_noise, perturb_input
from sdtrain.diffusion.prediction import training_target
from sdtrain.diffusion.schedule import NoiseSchedule, betas_of, schedule_of_betas
from sdtrain.diffusion.timesteps import draw_timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sdxl(zero_terminal_snr: bool) -> NoiseSchedule:
    return schedule_of_betas(betas_of("scaled_linear", 0.00085, 0.012, 1000), zero_terminal_snr=zero_terminal_snr)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_diffusers(zero_terminal_snr: bool, prediction: str) -> None:
    schedule = sdxl(zero_terminal_snr)
    peer = DDPMScheduler(
        1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    latents, noise = torch.randn(5, 4, 8, 8, generator=generator()), torch.randn(5, 4, 8, 8, generator=generator(1))
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    ours = schedule.add_noise(latents, noise, timesteps)
    assert torch.allclose(ours, peer.add_noise(latents, noise, timesteps), atol=1e-5)
    target = training_target(prediction, schedule, latents, noise, timesteps)  # type: ignore[arg-type]
    expected = noise if prediction == "epsilon" else peer.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target, expected, atol=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step() -> None:
    leaky, zero = sdxl(False), sdxl(True)
    assert zero.alphas_cumprod[-1] == 0
    assert torch.isclose(zero.alphas_cumprod[0], leaky.alphas_cumprod[0])
    assert zero.snr(torch.tensor([999])) == 0
    assert leaky.snr(torch.tensor([999])) > 1e-3


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        betas_of("cosine", 0.1, 0.2, 10)


@given(
    first=st.integers(0, 998),
    span=st.integers(1, 999),
    density=st.sampled_from(["uniform", "logit_normal"]),
    num=st.integers(1, 64),
)
def test_timesteps_stay_in_their_range(first: int, span: int, density: str, num: int) -> None:
    last = min(999, first + span)
    drawn = draw_timesteps(num, generator(), density=density, first=first, last=last)  # type: ignore[arg-type]
    assert drawn.shape == (num,)
    assert int(drawn.min()) >= first
    assert int(drawn.max()) <= last


def test_uniform_timesteps_reach_both_ends_equally_often() -> None:
    drawn = draw_timesteps(100_000, generator(), density="uniform", first=0, last=9)
    counts = torch.bincount(drawn, minlength=10).float() / 100_000
    assert torch.allclose(counts, torch.full((10,), 0.1), atol=0.005)


def test_logit_normal_prefers_its_mean() -> None:
    drawn = draw_timesteps(100_000, generator(), density="logit_normal", first=0, last=999, logit_mean=1.0).float()
    assert abs(drawn.median() / 1000 - torch.sigmoid(torch.tensor(1.0))) < 0.01


def test_noise_offset_moves_whole_channels() -> None:
    plain = draw_noise((64, 4, 16, 16), generator())
    offset = draw_noise((64, 4, 16, 16), generator(), offset=0.5)
    moved = offset - plain
    assert torch.allclose(moved, moved[..., :1, :1].expand_as(moved), atol=1e-6)
    assert abs(moved[..., 0, 0].std() - 0.5) < 0.08


def test_pyramid_noise_is_coarser_and_of_unit_variance() -> None:
    noise = draw_noise((8, 4, 32, 32), generator(), pyramid_discount=0.5)
    plain = draw_noise((8, 4, 32, 32), generator())
    assert abs(noise.std() - 1) < 0.01

    def roughness(x: torch.Tensor) -> torch.Tensor:
        return (x[..., 1:] - x[..., :-1]).square().mean()

    assert roughness(noise) < 0.9 * roughness(plain)


def test_input_perturbation_leaves_the_target_alone() -> None:
    noise = draw_noise((4, 4, 8, 8), generator())
    before = noise.clone()
    assert perturb_input(noise, generator(1), 0.0) is noise
    assert abs((perturb_input(noise, generator(1), 0.1) - noise).std() - 0.1) < 0.02
    assert torch.equal(noise, before)


def test_huber_is_square_for_small_and_linear_for_large_errors() -> None:
    zero = torch.zeros(1, 1, 1, 1)

    def huber(error: float) -> float:
        return float(error_per_image(zero + error, zero, kind="huber", huber_delta=0.1))

    assert huber(1e-3) == pytest.approx(1e-6, rel=1e-2)
    assert huber(20.0) - huber(10.0) == pytest.approx(2 * 0.1 * 10, rel=1e-3)
    assert float(error_per_image(zero + 3, zero, kind="l2")) == 9


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_weights_mean_the_same_for_both_targets(weighting: str) -> None:
    """An error e in x_0 is an epsilon error of SNR e and a v error of (SNR + 1) e: weighted, they must agree."""
    snr = torch.tensor([0.05, 1.0, 4.0, 5.0, 50.0])
    epsilon = timestep_weights(snr, prediction="epsilon", weighting=weighting, min_snr_gamma=5.0)  # type: ignore[arg-type]
    v = timestep_weights(snr, prediction="v_prediction", weighting=weighting, min_snr_gamma=5.0)  # type: ignore[arg-type]
    assert torch.allclose(epsilon * snr, v * (snr + 1))


def test_min_snr_is_the_published_weight() -> None:
    snr = torch.tensor([0.5, 5.0, 50.0])
    weights = timestep_weights(snr, prediction="epsilon", weighting="min_snr", min_snr_gamma=5.0)
    assert torch.allclose(weights, torch.tensor([1.0, 1.0, 0.1]))


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_finite_at_pure_noise(weighting: str, prediction: str) -> None:
    weights = timestep_weights(torch.zeros(3), prediction=prediction, weighting=weighting, min_snr_gamma=5.0)  # type: ignore[arg-type]
    assert weights.isfinite().all()
