"""The report on a set of pictures counts what the batches will see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.schema import DataConfig
from sdtrain.data.batches import Batches
from sdtrain.data.examples import Example, scan_folders
from sdtrain.data.report.summary import summarise


def test_the_report_counts_pictures_captions_buckets_crops_and_upscales(config: Callable[..., DataConfig]) -> None:
    examples = [
        Example(Path("square.png"), "one", 64, 64, 1),
        Example(Path("small.png"), "", 32, 32, 3),
        Example(Path("long.png"), "three", 640, 64, 1),
    ]
    report = summarise(examples, config(Path("unused"), max_aspect=2.0))
    assert (report.num_pictures, report.num_images, report.num_captioned, report.num_uncaptioned) == (3, 5, 2, 1)
    assert report.buckets == (((64, 64), 2), ((80, 48), 1))
    assert report.upscales == ((2.0, examples[1]),)
    ((share, example),) = report.crops
    assert example == examples[2] and 0.7 < share < 0.9
    assert report.mean_cropped_share == pytest.approx(share / 3)
    assert report.alone == (examples[2],) and report.moved == ()


def test_the_report_promises_the_steps_that_the_batches_have(
    pictures: Path, config: Callable[..., DataConfig], prepare: Callable[..., Batches], counting: Any
) -> None:
    settings = config(pictures, gradient_accumulation=2)
    report = summarise(scan_folders(settings, decode=False)[0], settings)
    batches = prepare(settings, counting.encoders())
    assert (report.steps_per_epoch, report.num_images) == (batches.steps_per_epoch, batches.num_examples)


def test_a_report_on_nothing_is_refused(config: Callable[..., DataConfig]) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        summarise([], config(Path("unused")))
