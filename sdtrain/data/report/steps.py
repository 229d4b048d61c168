"""What the steps of a run see, told without encoding anything: pictures, placements and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdtrain.config.schema import DataConfig
from sdtrain.data.buckets import Placement
from sdtrain.data.captions.drawing import Drawing, variants_of
from sdtrain.data.examples import Example
from sdtrain.data.order import Order
from sdtrain.data.placing import drawn_view, placements_of, views_of


@dataclass(frozen=True)
class Planned:
    """One picture of a step. caption: as it is drawn for that step, empty where it is dropped."""

    example: Example
    placement: Placement
    caption: str


class Steps:
    """The pictures of every step of a run on these examples, in planned micro-batches."""

    def __init__(
        self, config: DataConfig, examples: Sequence[Example], *, seed: int, captions_are_encoded_ahead: bool
    ) -> None:
        self._examples, self._placements = examples, placements_of(examples, config)
        self._order = Order(
            [placement.bucket for placement in self._placements],
            [example.repeats for example in examples],
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation,
            seed=seed,
        )
        variants = variants_of(examples, config.caption_variants) if captions_are_encoded_ahead else {}
        self._seed = seed
        self._drawing = Drawing(seed, config.caption_dropout, variants)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step begins in, both counted from 0."""
        return self._order.epoch_of(step)

    def at(self, step: int) -> list[list[Planned]]:
        """Return the planned micro-batches of a step, counted from 0."""
        batches = []
        for index, numbers in enumerate(self._order.step(step)):
            examples = [self._examples[number] for number in numbers]
            placements = [self._view(step, index, place, number) for place, number in enumerate(numbers)]
            captions = self._drawing.captions(step, index, examples)
            batches.append([Planned(*one) for one in zip(examples, placements, captions, strict=True)])
        return batches

    def _view(self, step: int, index: int, at: int, number: int) -> Placement:
        views = views_of(self._examples[number], self._placements[number])
        return views[drawn_view(self._seed, step, index, at, len(views))]
