"""The training loss of a batch: what the network should have predicted, and how far off it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from sdtrain.training.computing.preservation import Preservation
from sdtrain.training.run import autocast

CHOSEN, TEXT, SIZES = "chosen", "text/", "sizes/"
"""The input that tells which captions are preserved, and how those begin that a model is told of captions and sizes."""


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
        return self.loss(self.sent(self.inputs(batch, generator)), batch.captions)

    def inputs(self, batch: Batch, generator: Callable[[int], Generator]) -> dict[str, Tensor]:
        """Return all that the loss of a batch depends on but the networks and the captions, by name, on the CPU."""
        noise, seen, timesteps, chosen = self._drawn(batch, generator)
        given = self._inputs(batch, noise, seen, timesteps)
        if batch.weights is not None:
            given["importance"] = batch.weights
        if self.preservation is not None:
            given[CHOSEN] = chosen
        return given

    def sent(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs on the device.

        All of it is sent before anything is computed there: what is sent later would wait behind it.
        """
        stays = self.preservation is not None and self.preservation.encoded is None  # captions that are encoded anew
        return {
            name: tensor if stays and name == CHOSEN else sent(tensor, self.device) for name, tensor in inputs.items()
        }

    def loss(self, inputs: Mapping[str, Tensor], captions: Sequence[str]) -> Tensor:
        """Return the mean loss () for inputs on the device. captions: read where the text encoders are trained."""
        errors = self._errors(inputs, captions)
        loss = (errors * inputs["importance"]).mean() if "importance" in inputs else errors.mean()
        if self.preservation is None:
            return loss
        sizes = _named(SIZES, inputs)
        with autocast(self.config, self.device):
            lost = self.preservation.errors(inputs["noisy"], inputs["timesteps"], sizes, inputs[CHOSEN])
        return loss + lost.mean()

    def errors(self, batch: Batch, noise: Tensor, seen: Tensor, timesteps: Tensor) -> Tensor:
        """Return the weighted error of each picture of a batch, (n,) float32; gradients flow through it.

        Args:
            batch: n pictures.
            noise: what is to be found in the pictures, (n, c, h, w).
            seen: the noise that the network sees, of that shape; another one than `noise` for perturbed inputs.
            timesteps: the noise level of each picture, (n,).
        """
        return self._errors(self.sent(self._inputs(batch, noise, seen, timesteps)), batch.captions)

    def _inputs(self, batch: Batch, noise: Tensor, seen: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        config, model, latents = self.config, self.model, batch.latents
        given = {
            "noisy": model.schedule.add_noise(latents, seen, timesteps),
            "target": training_target(model.prediction, model.schedule, latents, noise, timesteps),
            "weights": timestep_weights(
                model.schedule.snr(timesteps),
                prediction=model.prediction,
                weighting=config.loss.weighting,
                min_snr_gamma=config.loss.min_snr_gamma,
            ),
            "deltas": huber_deltas(
                model.schedule, timesteps, kind=config.loss.huber_schedule, delta=config.loss.huber_delta
            ),
            "timesteps": timesteps,
        }
        given |= {TEXT + name: tensor for name, tensor in (batch.text or {}).items()}
        given |= {SIZES + name: tensor for name, tensor in batch.sizes.items()}
        return given if batch.counts is None else {**given, "counts": batch.counts}

    def _errors(self, inputs: Mapping[str, Tensor], captions: Sequence[str]) -> Tensor:
        with autocast(self.config, self.device):
            text = _named(TEXT, inputs) or self.model.encode_captions(captions)
            prediction = self.model.predict(inputs["noisy"], inputs["timesteps"], {**text, **_named(SIZES, inputs)})
        loss, counts = self.config.loss, inputs.get("counts")
        errors = error_per_image(
            prediction, inputs["target"], kind=loss.kind, huber_delta=inputs["deltas"], counts=counts
        )
        return errors * inputs["weights"]

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


def _named(start: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): tensor for name, tensor in inputs.items() if name.startswith(start)}


def draw_inputs(
    config: Config, shape: tuple[int, int, int, int], generator: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw for pictures with latents of a shape (n, c, h, w): the noise, the noise that is seen, timesteps (n,), and
    the numbers of the captions that are preserved (n,).
    """
    num = shape[0]
    noise = draw_noise(shape, generator, offset=config.noise.offset, pyramid_discount=config.noise.pyramid_discount)
    timesteps = draw_timesteps(num, generator, **dict(config.timesteps))
    seen = perturb_input(noise, generator, config.noise.input_perturbation)
    chosen = torch.randint(len(config.preserve.captions), (num,), generator=generator)  # last: it moves no other draw
    return noise, seen, timesteps, chosen
