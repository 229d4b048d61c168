"""The training loss of a batch: what the network should have predicted, and how far off it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sdtrain.config.schema import Config
from sdtrain.data.batches import Batch
from sdtrain.diffusion.loss import error_per_image, huber_deltas, timestep_weights
from sdtrain.diffusion.noise import draw_noise, perturb_input
from sdtrain.diffusion.prediction import training_target
from sdtrain.diffusion.timesteps import draw_timesteps
from sdtrain.models.model import Model


@dataclass(frozen=True)
class Objective:
    """The training loss of a model under a config."""

    model: Model
    config: Config
    device: torch.device

    def __call__(self, batch: Batch, generator: Generator) -> Tensor:
        """Return the mean loss () of a batch, with noise and timesteps from `generator`; gradients flow through it."""
        config, model = self.config, self.model
        latents = batch.latents
        num, channels, height, width = latents.shape
        noise = draw_noise(
            (num, channels, height, width),
            generator,
            offset=config.noise.offset,
            pyramid_discount=config.noise.pyramid_discount,
        )
        timesteps = draw_timesteps(
            num,
            generator,
            density=config.timesteps.density,
            first=config.timesteps.first,
            last=config.timesteps.last,
            logit_mean=config.timesteps.logit_mean,
            logit_std=config.timesteps.logit_std,
        )
        seen = perturb_input(noise, generator, config.noise.input_perturbation)
        noisy = model.schedule.add_noise(latents, seen, timesteps)
        target = training_target(model.prediction, model.schedule, latents, noise, timesteps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.model.dtype == "mixed"):
            text = model.encode_captions(batch.captions) if batch.text is None else batch.text
            prediction = model.predict(noisy, timesteps, {**text, **batch.sizes})
        deltas = huber_deltas(model.schedule, timesteps, kind=config.loss.huber_schedule, delta=config.loss.huber_delta)
        errors = error_per_image(prediction, target.to(prediction.device), kind=config.loss.kind, huber_delta=deltas)
        weights = timestep_weights(
            model.schedule.snr(timesteps),
            prediction=model.prediction,
            weighting=config.loss.weighting,
            min_snr_gamma=config.loss.min_snr_gamma,
        )
        return (errors * weights.to(errors.device)).mean()
