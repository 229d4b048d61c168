"""The training loss of a batch: what the network should have predicted, and how far off it was."""

from __future__ import annotations

from collections.abc import Callable
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
from sdtrain.models.placing import sent


@dataclass(frozen=True)
class Objective:
    """The training loss of a model under a config."""

    model: Model
    config: Config
    device: torch.device

    def __call__(self, batch: Batch, generator: Callable[[int], Generator]) -> Tensor:
        """Return the mean loss () of a batch; gradients flow through it.

        generator: a fresh one for a planned micro-batch of the step, by its index; noise and timesteps come from there.
        """
        return self.errors(batch, *self._drawn(batch, generator)).mean()

    def errors(self, batch: Batch, noise: Tensor, seen: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted error of each picture of a batch, (n,) float32; gradients flow through it.

        Args:
            batch: n pictures.
            noise: what is to be found in the pictures, (n, c, h, w).
            seen: the noise that the network sees, of that shape; another one than `noise` for perturbed inputs.
            timesteps: the noise level of each picture, (n,).
        """
        config, model, latents, device = self.config, self.model, batch.latents, self.device
        noisy = model.schedule.add_noise(latents, seen, timesteps)
        target = training_target(model.prediction, model.schedule, latents, noise, timesteps)
        deltas = huber_deltas(model.schedule, timesteps, kind=config.loss.huber_schedule, delta=config.loss.huber_delta)
        weights = timestep_weights(
            model.schedule.snr(timesteps),
            prediction=model.prediction,
            weighting=config.loss.weighting,
            min_snr_gamma=config.loss.min_snr_gamma,
        )
        # All of it is sent before anything is computed there: what is sent later would wait behind it.
        noisy, target, weights, deltas = (sent(tensor, device) for tensor in (noisy, target, weights, deltas))
        steps = sent(timesteps, device)
        there = {name: sent(tensor, device) for name, tensor in {**(batch.text or {}), **batch.sizes}.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.model.dtype == "mixed"):
            text = model.encode_captions(batch.captions) if batch.text is None else {}
            prediction = model.predict(noisy, steps, {**text, **there})
        errors = error_per_image(prediction, target, kind=config.loss.kind, huber_delta=deltas)
        return errors * weights

    def _drawn(self, batch: Batch, generator: Callable[[int], Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the noise, the noise that the network sees, both (n, c, h, w), and the timesteps, (n,).

        They are drawn for whole planned micro-batches, of which the batch has its rows: so they are the same whatever
        is computed at once.
        """
        drawn = []
        for piece in batch.pieces:
            whole = self._draw(piece.total, batch.latents.shape, generator(piece.index))
            drawn.append([tensor[piece.start : piece.stop] for tensor in whole])
        noise, seen, timesteps = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        return noise, seen, timesteps

    def _draw(self, num: int, shape: torch.Size, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        noise = draw_noise(
            (num, *shape[1:]),
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
        return noise, perturb_input(noise, generator, config.noise.input_perturbation), timesteps
