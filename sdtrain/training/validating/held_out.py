"""The pictures that are held out, with a noise of their own: the same numbers go in at every validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sdtrain.data.batches import Batch, Batches
from sdtrain.diffusion.noise import draw_noise
from sdtrain.diffusion.timesteps import stratified_timesteps
from sdtrain.training.computing.objective import Objective
from sdtrain.training.run import generator_of


@dataclass(frozen=True)
class HeldOut:
    """Pictures to validate on, in batches that are always the same."""

    batches: Batches
    identities: Mapping[Path, str]

    @property
    def pictures(self) -> list[str]:
        """The identities of the pictures, each once, in a fixed order."""
        return sorted(set(self.identities.values()))

    def losses(
        self, objective: Objective, is_given_up: Callable[[], bool], *, hand: int = 0, hands: int = 1
    ) -> dict[str, float] | None:
        """Return the loss of each picture by its identity, with the weights as they are now; None if it is given up.

        hand, hands: only the pictures of the process with this number, of so many that share them.

        It is the mean over the noise levels of what the training minimises, without dropped captions, tags that move
        or are left out, and perturbed inputs. Noise and timesteps of a picture follow from its identity and
        `validation.seed`.
        """
        found: dict[str, float] = {}
        for batch in islice(self._batches(), hand, None, hands):
            if is_given_up():
                return None
            names = [self.identities[example.path] for example in batch.examples]
            found |= dict(zip(names, _mean_errors(objective, batch, names).tolist(), strict=True))
        return {name: found[name] for name in self.pictures if name in found}

    def _batches(self) -> Iterator[Batch]:
        """Yield one epoch, whose order the seed decides; it is made with one micro-batch a step."""
        for step in range(round(self.batches.steps_per_epoch)):
            for batch, _ in self.batches.at(step):
                yield batch


@torch.no_grad()
def _mean_errors(objective: Objective, batch: Batch, names: Sequence[str]) -> Tensor:
    """Return the error of each picture of a batch, (n,) float64, averaged over its noise levels."""
    config = objective.config
    levels = config.validation.noise_levels
    generators = [generator_of(config.validation.seed, f"validation {name}") for name in names]
    timesteps = torch.stack(
        [stratified_timesteps(levels, generator, **dict(config.timesteps)) for generator in generators]
    )
    _, channels, height, width = batch.latents.shape
    total = torch.zeros(len(names), dtype=torch.float64)
    for level in range(levels):
        noise = torch.cat(
            [
                draw_noise(
                    (1, channels, height, width),
                    generator,
                    offset=config.noise.offset,
                    pyramid_discount=config.noise.pyramid_discount,
                )
                for generator in generators
            ]
        )
        total += objective.errors(batch, noise, noise, timesteps[:, level]).double().cpu()
    return total / levels
