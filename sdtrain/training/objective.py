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
from sdtrain.training.preservation import Preservation
from sdtrain.training.run import autocast


@dataclass(frozen=True)
class Objective:
    """The training loss of a model under a config."""

    model: Model
    config: Config
    device: torch.device
    preservation: Preservation | None = None

    def __call__(self, batch: Batch, generator: Callable[[int], Generator]) -> Tensor:
        """Return the mean loss () of a batch: of its pictures' errors times their weights; gradients flow through it.

        generator: a fresh one for a planned micro-batch of the step, by its index; noise and timesteps come from there.
        """
        noise, seen, timesteps, chosen = self._drawn(batch, generator)
        weights = None if batch.weights is None else sent(batch.weights, self.device)
        errors = self.errors(batch, noise, seen, timesteps)
        loss = errors.mean() if weights is None else (errors * weights).mean()
        if self.preservation is None:
            return loss
        noisy = sent(self.model.schedule.add_noise(batch.latents, seen, timesteps), self.device)
        steps, sizes = sent(timesteps, self.device), {key: sent(size, self.device) for key, size in batch.sizes.items()}
        with autocast(self.config, self.device):
            lost = self.preservation.errors(noisy, steps, sizes, chosen)
        return loss + lost.mean()

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
        counts = None if batch.counts is None else sent(batch.counts, device)
        there = {name: sent(tensor, device) for name, tensor in {**(batch.text or {}), **batch.sizes}.items()}
        with autocast(self.config, self.device):
            text = model.encode_captions(batch.captions) if batch.text is None else {}
            prediction = model.predict(noisy, steps, {**text, **there})
        errors = error_per_image(prediction, target, kind=config.loss.kind, huber_delta=deltas, counts=counts)
        return errors * weights

    def _drawn(self, batch: Batch, generator: Callable[[int], Generator]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw the noise, the noise that the network sees, both (n, c, h, w), the timesteps, (n,), and which caption is
        preserved, (n,).

        They are drawn for whole planned micro-batches, of which the batch has its rows: so they are the same whatever
        is computed at once.
        """
        drawn = []
        for piece in batch.pieces:
            shape = (piece.total, *batch.latents.shape[1:])
            whole = draw_inputs(self.config, shape, generator(piece.index))
            drawn.append([tensor[piece.start : piece.stop] for tensor in whole])
        noise, seen, timesteps, chosen = (torch.cat(tensors) for tensors in zip(*drawn, strict=True))
        return noise, seen, timesteps, chosen


def draw_inputs(
    config: Config, shape: tuple[int, int, int, int], generator: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw for pictures with latents of a shape (n, c, h, w): the noise, the noise that is seen, timesteps (n,), and
    the numbers of the captions that are preserved (n,).
    """
    num = shape[0]
    noise = draw_noise(shape, generator, offset=config.noise.offset, pyramid_discount=config.noise.pyramid_discount)
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
    chosen = torch.randint(len(config.preserve.captions), (num,), generator=generator)  # last: it moves no other draw
    return noise, seen, timesteps, chosen
