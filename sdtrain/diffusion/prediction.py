"""What the network is asked to predict."""

from __future__ import annotations

from typing import assert_never

from torch import Tensor

from sdtrain.diffusion.schedule import NoiseSchedule
from sdtrain.diffusion.words import Prediction


def training_target(
    prediction: Prediction, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Return what the network should predict, (n, c, h, w), for latents and noise of that shape at timesteps (n,).

    epsilon: the noise (arXiv 2006.11239). v_prediction: sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512, app. D).
    """
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":
            signal, sigma = schedule.signal_and_noise(timesteps, latents)
            return signal * noise - sigma * latents
        case _:
            assert_never(prediction)
