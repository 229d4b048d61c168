"""How wrong a prediction is, and how much each timestep counts."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from sdtrain.diffusion.words import LossKind, Prediction, Weighting


def error_per_image(prediction: Tensor, target: Tensor, *, kind: LossKind, huber_delta: float = 0.1) -> Tensor:
    """Return the mean error of each picture, (n,) float32, for predictions and targets of shape (n, c, h, w).

    l2 is the squared error. huber is 2 delta (sqrt(e^2 + delta^2) - delta), the smooth form: e^2 for small errors e,
    linear for large ones.
    """
    difference = prediction.float() - target.float()
    match kind:
        case "l2":
            error = difference.square()
        case "huber":
            error = 2 * huber_delta * ((difference.square() + huber_delta**2).sqrt() - huber_delta)
        case _:
            assert_never(kind)
    return error.flatten(1).mean(dim=1)


def timestep_weights(snr: Tensor, *, prediction: Prediction, weighting: Weighting, min_snr_gamma: float) -> Tensor:
    """Return the weight of each picture's error, (n,), for the signal-to-noise ratios (n,) of their timesteps.

    min_snr: min(SNR, gamma) in x_0-space, so over SNR for epsilon and over SNR + 1 for v (arXiv 2303.09556, eq. 8 and
    section 3.4). debiased: 1 / sqrt(SNR) for epsilon (arXiv 2310.08442, eq. 10), which is sqrt(SNR) / (SNR + 1) for v.
    SNR is 0 at a zero-terminal end; there epsilon weights are bounded, v weights need no bound.
    """
    match weighting:
        case "none":
            return torch.ones_like(snr)
        case "min_snr":
            return snr.clamp(max=min_snr_gamma) / (snr.clamp(min=1e-8) if prediction == "epsilon" else snr + 1)
        case "debiased":
            return snr.clamp(min=1e-3).rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)
        case _:
            assert_never(weighting)
