"""How wrong a prediction is, and how much each timestep counts."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from sdtrain.diffusion.schedule import NoiseSchedule
from sdtrain.diffusion.words import HuberSchedule, LossKind, Prediction, Weighting

KOHYA_SNR_LIMIT = 1000.0
"""sd-scripts counts no more signal than this in its weights."""


def error_per_image(
    prediction: Tensor,
    target: Tensor,
    *,
    kind: LossKind,
    huber_delta: float | Tensor = 0.1,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the mean error of each picture, (n,) float32, for predictions and targets of shape (n, c, h, w).

    l2 is the squared error and l1 the absolute one. huber is 2 delta (sqrt(e^2 + delta^2) - delta), the smooth form:
    e^2 for small errors e, linear for large ones. smooth_l1 is the same over delta: 2 |e| for large errors, whatever
    delta is. huber_delta: one for all pictures, or one for each, (n,).

    counts: how much the error of each place counts, (n, h, w) from 0 to 1; None: 1. The mean is over all places, also
    those that count 0, as in sd-scripts and, unless told otherwise, OneTrainer: so a place that counts is trained
    exactly as hard as without a mask, and a tiny mask does not make a step of noise out of a few places. Over the
    places that count instead, their errors would weigh the more the fewer they are.
    """
    difference = prediction.float() - target.float()
    match kind:
        case "l2":
            error = difference.square()
        case "l1":
            error = difference.abs()
        case "huber" | "smooth_l1":
            error = _pseudo_huber(difference, huber_delta, times_delta=kind == "huber")
        case _:
            assert_never(kind)
    if counts is not None:
        error = error * counts.unsqueeze(1)
    return error.flatten(1).mean(dim=1)


def _pseudo_huber(difference: Tensor, delta: float | Tensor, *, times_delta: bool) -> Tensor:
    """2 (sqrt(e^2 + delta^2) - delta), times delta or not; delta is rounded to float32 as late as a number would be."""
    deltas = torch.as_tensor(delta, dtype=torch.float64, device=difference.device).view(
        -1, *[1] * (difference.dim() - 1)
    )
    distance = (difference.square() + deltas.square().float()).sqrt() - deltas.float()
    return ((2 * deltas).float() if times_delta else 2) * distance


def huber_deltas(schedule: NoiseSchedule, timesteps: Tensor, *, kind: HuberSchedule, delta: float) -> Tensor:
    """Return where the Huber error of each picture turns linear, (n,) float64, for timesteps (n,).

    constant: delta at every timestep. exponential: delta^(t / T), from 1 at t = 0 to delta at the end T. snr: the same
    way, but along the noise: (1 - delta) / (1 + sigma)^2 + delta with sigma = 1 / sqrt(SNR). So pictures with little
    noise get the squared error nearly everywhere, where fine details are learnt, and noisy ones the robust error.

    Source: arXiv 2403.16728 (Huber errors with a delta for each timestep); the three formulas are those of sd-scripts,
    `--huber_schedule` with `--huber_c` for delta.
    """
    match kind:
        case "constant":
            return torch.full(timesteps.shape, delta, dtype=torch.float64, device=timesteps.device)
        case "exponential":
            return torch.as_tensor(delta, dtype=torch.float64) ** (timesteps.double() / schedule.num_timesteps)
        case "snr":
            root = schedule.snr(timesteps).double().sqrt()
            return (1 - delta) * (root / (1 + root)).square() + delta  # 1 / (1 + sigma), finite at pure noise too
        case _:
            assert_never(kind)


def timestep_weights(snr: Tensor, *, prediction: Prediction, weighting: Weighting, min_snr_gamma: float) -> Tensor:
    """Return the weight of each picture's error, (n,), for the signal-to-noise ratios (n,) of their timesteps.

    min_snr: min(SNR, gamma) in x_0-space, so over SNR for epsilon and over SNR + 1 for v (arXiv 2303.09556, eq. 8 and
    section 3.4). debiased: 1 / sqrt(SNR) for epsilon (arXiv 2310.08442, eq. 10), which is sqrt(SNR) / (SNR + 1) for v.
    debiased_kohya: what sd-scripts calls debiased: 1 / sqrt(SNR) for epsilon, 1 / (SNR + 1) for v, which is largest
    where there is most noise; SNR counts up to 1000. scale_v_like_noise: SNR / (SNR + 1), which makes of a v error the
    epsilon error that it means (`scale_v_pred_loss_like_noise_pred` in sd-scripts); it is for v alone.
    SNR is 0 at a zero-terminal end; there epsilon weights are bounded, v weights need no bound: they are 0, except
    those of none and debiased_kohya, which are 1.

    Raises ValueError for scale_v_like_noise with epsilon.
    """
    match weighting:
        case "none":
            return torch.ones_like(snr)
        case "min_snr":
            return snr.clamp(max=min_snr_gamma) / (snr.clamp(min=1e-8) if prediction == "epsilon" else snr + 1)
        case "debiased":
            return snr.clamp(min=1e-3).rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)
        case "debiased_kohya":
            counted = snr.clamp(max=KOHYA_SNR_LIMIT)
            return counted.clamp(min=1e-3).rsqrt() if prediction == "epsilon" else 1 / (counted + 1)
        case "scale_v_like_noise":
            if prediction == "epsilon":
                raise ValueError("scale_v_like_noise weighs errors of v, not of epsilon")
            return snr / (snr + 1)
        case _:
            assert_never(weighting)
