"""Keeping what the model knew: the base, without its adapters, teaches the adapted model its own answers.

Pictures of the new thing move what the model draws for other captions too. So, at the same noisy pictures and
timesteps, the model is asked for captions that do not name the new thing, and its answer is held to that of the base.
No other pictures are needed. Known elsewhere as output or prior preservation; learning without forgetting, arXiv
1606.09282, is the idea.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.adapters.base import without_adapters
from sdtrain.config.settings.objective import PreserveConfig
from sdtrain.models.model import Model
from sdtrain.models.placing import sent


@dataclass(frozen=True)
class Preservation:
    """The captions that must be answered as before, and how much that counts.

    encoded: their conditioning, a row a caption; None where the text encoders are trained.
    """

    model: Model
    captions: tuple[str, ...]
    weight: float
    encoded: Mapping[str, Tensor] | None

    def errors(self, noisy: Tensor, timesteps: Tensor, sizes: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the weighted squared difference from the base for each picture, (n,); gradients flow through it.

        Args:
            noisy: noisy latents (n, c, h, w).
            timesteps: theirs, (n,).
            sizes: what the model is told of their sizes.
            chosen: the number of a caption for each picture, (n,), on the CPU.
        """
        with torch.no_grad(), self._base():
            taught = self.model.predict(noisy, timesteps, {**self._text(chosen), **sizes}).float()
        answered = self.model.predict(noisy, timesteps, {**self._text(chosen), **sizes}).float()
        return self.weight * (answered - taught).square().flatten(1).mean(1)

    def _text(self, chosen: Tensor) -> dict[str, Tensor]:
        if self.encoded is None:
            return self.model.encode_captions([self.captions[number] for number in chosen.tolist()])
        return {name: rows[sent(chosen, rows.device)] for name, rows in self.encoded.items()}

    def _base(self) -> AbstractContextManager[None]:
        return without_adapters(self.model.networks.values())


def prepare_preservation(model: Model, config: PreserveConfig, *, trains_text: bool) -> Preservation | None:
    """Return what holds a model to its base, None where nothing does; the captions are encoded now, if they can be."""
    if not config.weight:
        return None
    captions = tuple(config.captions)
    encoded = None
    if not trains_text:
        with torch.no_grad():
            rows = [model.encode_captions([caption]) for caption in captions]
        encoded = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return Preservation(model, captions, config.weight, encoded)
