"""Laws of the captions of a step: what they depend on, and that all that may be drawn is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.batches import Batches
from sdtrain.data.captions.drawing import Drawing, variants_of
from sdtrain.data.captions.wording import Varied, Wording
from sdtrain.data.examples import Example

Prepare = Callable[..., Batches]
MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def tagged(tmp_path: Path, picture: Callable[..., None], config: MakeConfig) -> Callable[..., DataConfig]:
    """A config on three pictures with five tags each, shuffled behind the first."""
    for number in range(3):
        picture(tmp_path / "tagged" / f"{number}.png", (64, 64), f"n{number}, a, b, c, d", seed=number)

    def make(**settings: object) -> DataConfig:
        folder = {"path": str(tmp_path / "tagged"), "shuffle_tags": True, "keep_tags": 1}
        folder |= {name: settings.pop(name) for name in list(settings) if name in FolderConfig.model_fields}
        return config(FolderConfig.model_validate(folder), **settings)

    return make


def drawn(batches: Batches, steps: range) -> list[tuple[str, ...]]:
    return [batch.captions for step in steps for batch, _ in batches.at(step)]


def test_captions_are_a_function_of_seed_and_step(prepare: Prepare, tagged: Callable[..., Any], counting: Any) -> None:
    for text in (True, False):
        fresh, used, other = (prepare(tagged(), counting.encoders(captions=text), seed=seed) for seed in (0, 0, 1))
        drawn(used, range(9, 30))
        assert drawn(used, range(3, 9)) == drawn(fresh, range(3, 9)) != drawn(other, range(3, 9))


@pytest.mark.parametrize("ahead", [True, False])
def test_each_seed_step_micro_batch_and_place_has_a_draw_of_its_own(ahead: bool) -> None:
    varied = Varied(tuple("abcdefghijklmnop"), Wording())
    example = Example(Path("a.png"), "a", 64, 64, 1, varied)
    variants = variants_of([example], 1) if ahead else {}

    def draw(seed: int, step: int, index: int) -> list[str]:
        return Drawing(seed, 0.0, variants).captions(step, index, [example] * 40)

    first = draw(0, 0, 0)
    assert draw(0, 0, 0) == first and len(set(first)) > 8
    for other in (draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)):
        assert sum(one == two for one, two in zip(first, other, strict=True)) < 15


def test_every_drawn_caption_has_its_own_encoding(prepare: Prepare, tagged: Callable[..., Any], counting: Any) -> None:
    batches = prepare(tagged(caption_dropout=0.2, wildcards=True, tag_dropout=0.5), counting.encoders())
    for step in range(20):
        for batch, _ in batches.at(step):
            expected = counting.encode_captions(list(batch.captions))
            assert all(torch.equal(batch.text[name], tensor.float()) for name, tensor in expected.items())


def test_of_the_wordings_encoded_ahead_all_are_seen_about_equally_often(
    prepare: Prepare, tagged: Callable[..., Any], counting: Any
) -> None:
    batches = prepare(tagged(caption_variants=4), counting.encoders())
    seen = Counter(caption for captions in drawn(batches, range(400)) for caption in captions)
    assert set(seen) == set(counting.captions)
    first = {caption: times for caption, times in seen.items() if caption.startswith("n0, ")}
    assert 3 <= len(first) <= 4 and sum(first.values()) == 200
    assert all(abs(times - 200 / len(first)) < 35 for times in first.values())


def test_a_second_run_with_another_seed_encodes_nothing_again(
    prepare: Prepare, tagged: Callable[..., Any], counting: Any
) -> None:
    prepare(tagged(), counting.encoders(), seed=0)
    encoded = len(counting.captions)
    prepare(tagged(), counting.encoders(), seed=1)
    assert len(counting.captions) == encoded > 3


def test_captions_that_the_loop_encodes_are_drawn_from_all_wordings(
    prepare: Prepare, tagged: Callable[..., Any], counting: Any
) -> None:
    batches = prepare(tagged(caption_variants=1), counting.encoders(captions=False))
    seen = {caption for captions in drawn(batches, range(300)) for caption in captions if caption.startswith("n0, ")}
    assert len(seen) == 24  # 4 tags in any order


def test_lines_are_drawn_from_the_cache(
    tmp_path: Path, prepare: Prepare, picture: Callable[..., None], config: MakeConfig, counting: Any
) -> None:
    picture(tmp_path / "lines" / "a.png", (64, 64), "one\ntwo\nthree")
    folder = FolderConfig(path=str(tmp_path / "lines"), caption_lines="drawn")
    batches = prepare(config(folder, caption_variants=1), counting.encoders())
    assert sorted(counting.captions) == ["one", "three", "two"]
    assert {captions[0] for captions in drawn(batches, range(40))} == {"one", "two", "three"}
