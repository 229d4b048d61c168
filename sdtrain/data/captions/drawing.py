"""The captions of a step: which wording each picture gets, and which are left empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdtrain.data.captions.wording import Varied
from sdtrain.data.counts import stream
from sdtrain.data.examples import Example
from sdtrain.data.order import dropped


@dataclass(frozen=True)
class Drawing:
    """How the captions of a run are drawn: a function of (seed, step, planned micro-batch, place in it) only.

    dropout: share of captions that are left empty. variants: the wordings that are encoded ahead, of which one is
    drawn; what is not there is worded anew at every step.
    """

    seed: int
    dropout: float
    variants: Mapping[Varied, tuple[str, ...]] = field(default_factory=dict)

    def captions(self, step: int, index: int, examples: Sequence[Example]) -> list[str]:
        """Return the captions of the pictures in planned micro-batch `index` of a step, "" where dropped."""
        empty = dropped(self.seed, step, index, len(examples), self.dropout)
        return [
            "" if is_empty else self._caption(step, index, place, example)
            for place, (is_empty, example) in enumerate(zip(empty, examples, strict=True))
        ]

    def _caption(self, step: int, index: int, place: int, example: Example) -> str:
        if example.varied is None:
            return example.caption
        random = stream(self.seed, "caption", step, index, place)
        variants = self.variants.get(example.varied)
        return random.choice(variants) if variants else example.varied.draw(random)


def variants_of(examples: Sequence[Example], num: int) -> dict[Varied, tuple[str, ...]]:
    """Return the wordings to be encoded ahead of all captions that vary, at most `num` for each of their texts."""
    distinct = dict.fromkeys(example.varied for example in examples if example.varied is not None)
    return {varied: varied.variants(num) for varied in distinct}


def captions_to_encode(
    examples: Sequence[Example], variants: Mapping[Varied, tuple[str, ...]], dropout: float
) -> list[str]:
    """Return every caption that a run may draw."""
    captions: list[str] = []
    for example in examples:
        captions += [example.caption] if example.varied is None else variants[example.varied]
    return captions + ([""] if dropout > 0 else [])
