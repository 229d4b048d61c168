"""Laws of the batches: what a step sees, and what is encoded for it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data import cache as store
from sdtrain.data.batches import Batch, Batches, Encoders, Plan, prepare_batches
from sdtrain.data.examples import Example, scan_folders
from sdtrain.errors import UserError

Prepare = Callable[..., Batches]
MakeConfig = Callable[..., DataConfig]


def same(one: Batch, other: Batch) -> bool:
    """Bit for bit."""
    return (
        (one.index, one.captions, one.examples) == (other.index, other.captions, other.examples)
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.sizes["time_ids"], other.sizes["time_ids"])
        and one.text.keys() == other.text.keys()
        and all(torch.equal(tensor, other.text[name]) for name, tensor in one.text.items())
    )


def assert_same_steps(one: Batches, other: Batches, steps: range) -> None:
    for step in steps:
        pairs = zip(one.at(step), other.at(step), strict=True)
        assert all(same(a, b) and share == other_share for (a, share), (b, other_share) in pairs)


def test_a_batch_has_the_promised_shapes(prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any) -> None:
    batches = prepare(config(pictures, gradient_accumulation=3), counting.encoders())
    for batch, _ in batches.at(0):
        n = len(batch.examples)
        assert 1 <= n <= 2 and len(batch.captions) == n
        height, width = (int(side) for side in batch.sizes["time_ids"][0, 4:])
        assert batch.latents.shape == (n, 3, height // 8, width // 8) and batch.latents.dtype == torch.float32
        assert batch.sizes["time_ids"].shape == (n, 6) and batch.sizes["time_ids"].dtype == torch.float32
        assert {name: tensor.shape for name, tensor in batch.text.items()} == {
            "prompt_embeds": (n, 7, 4),
            "pooled": (n, 4),
        }
        assert all(tensor.dtype == torch.float32 for tensor in batch.text.values())


def test_shares_of_a_step_sum_to_one_and_count_pictures(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    batches = prepare(config(pictures, gradient_accumulation=3), counting.encoders())
    for step in range(6):
        drawn = list(batches.at(step))
        num = sum(len(batch.examples) for batch, _ in drawn)
        assert [batch.index for batch, _ in drawn] == [0, 1, 2]
        assert sum(share for _, share in drawn) == pytest.approx(1.0)
        assert all(share == len(batch.examples) / num for batch, share in drawn)


def test_an_epoch_holds_every_picture_as_often_as_its_folder_says(
    prepare: Prepare, config: MakeConfig, pictures: Path, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    picture(tmp_path / "more" / "a.png", (64, 64), "a", seed=20)
    often = FolderConfig(path=str(tmp_path / "more"), repeats=3)
    batches = prepare(config(pictures, often), counting.encoders())
    steps = round(batches.steps_per_epoch)
    assert steps == batches.steps_per_epoch
    seen = Counter(example.path.name for step in range(steps) for b, _ in batches.at(step) for example in b.examples)
    assert seen == {**{f"{number}.png": 1 for number in range(7)}, "a.png": 3}
    assert batches.num_examples == 10


def test_every_planned_step_is_there_with_all_its_micro_batches(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    batches = prepare(config(pictures, gradient_accumulation=5, batch_size=4), counting.encoders())
    assert all(len(list(batches.at(step))) == 5 for step in range(12))


def test_what_a_step_sees_does_not_depend_on_what_was_asked_before(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    settings = config(pictures, gradient_accumulation=2, caption_dropout=0.5)
    fresh, used = prepare(settings, counting.encoders()), prepare(settings, counting.encoders())
    for step in (9, 3, 30, 0):
        list(used.at(step))
    assert_same_steps(used, fresh, range(7, 12))


def test_another_seed_gives_another_order(prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any) -> None:
    one, other = (prepare(config(pictures), counting.encoders(), seed=seed) for seed in (0, 1))
    assert any(
        a.examples != b.examples
        for step in range(4)
        for (a, _), (b, _) in zip(one.at(step), other.at(step), strict=True)
    )


def test_cached_is_uncached_bit_for_bit_and_a_second_run_encodes_nothing(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    settings = config(pictures, caption_dropout=0.3)
    first = prepare(settings, counting.encoders())
    assert len(counting.pictures) == 7 and len(counting.captions) == 8
    second = prepare(settings, counting.encoders())
    assert len(counting.pictures) == 7 and len(counting.captions) == 8
    assert_same_steps(first, second, range(12))


def test_latents_are_what_the_encoder_returned(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    batches = prepare(config(pictures, batch_size=1), counting.encoders())
    encoded = [counting.encode_pixels(pixels[None])[0].float() for pixels in list(counting.pictures)]
    for step in range(7):
        for batch, _ in batches.at(step):
            assert any(torch.equal(batch.latents[0], latents) for latents in encoded)
            expected = counting.encode_captions(list(batch.captions))
            assert all(torch.equal(batch.text[name], tensor.float()) for name, tensor in expected.items())


def test_one_edited_picture_is_one_more_encoding(
    prepare: Prepare, config: MakeConfig, pictures: Path, picture: Callable[..., None], counting: Any
) -> None:
    prepare(config(pictures), counting.encoders())
    picture(pictures / "3.png", (128, 64), None, seed=99)
    edited = prepare(config(pictures), counting.encoders())
    assert (len(counting.pictures), len(counting.captions)) == (8, 7)
    assert_same_steps(edited, prepare(config(pictures), counting.encoders(), cache="other"), range(7))


def test_one_edited_caption_is_one_more_encoding(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    prepare(config(pictures), counting.encoders())
    (pictures / "3.txt").write_text("another caption")
    prepare(config(pictures), counting.encoders())
    assert (len(counting.pictures), len(counting.captions)) == (7, 8)


def test_a_renamed_picture_is_not_encoded_again(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    prepare(config(pictures), counting.encoders())
    for suffix in (".png", ".txt"):
        (pictures / f"3{suffix}").rename(pictures / f"z{suffix}")
    prepare(config(pictures), counting.encoders())
    assert (len(counting.pictures), len(counting.captions)) == (7, 7)


def test_other_encoders_are_other_entries(prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any) -> None:
    prepare(config(pictures), counting.encoders())
    prepare(config(pictures), counting.encoders(vae="another"))
    assert (len(counting.pictures), len(counting.captions)) == (14, 7)
    prepare(config(pictures), counting.encoders(text="another"))
    assert (len(counting.pictures), len(counting.captions)) == (14, 14)


def test_a_damaged_cache_entry_is_encoded_again(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, tmp_path: Path
) -> None:
    before = prepare(config(pictures), counting.encoders())
    entries = sorted((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    entries[0].write_bytes(entries[0].read_bytes()[:-3])
    flipped = bytearray(entries[1].read_bytes())
    flipped[-1] ^= 1
    entries[1].write_bytes(flipped)
    after = prepare(config(pictures), counting.encoders())
    assert len(counting.pictures) == 9
    assert_same_steps(before, after, range(7))


def test_above_the_budget_only_verifying_finds_an_entry_whose_bytes_changed(
    config: MakeConfig, pictures: Path, counting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    settings = config(pictures)
    examples, _ = scan_folders(settings, decode=False)

    def encoded_again(verify: bool) -> tuple[int, int]:
        counting.pictures, counting.captions = [], []
        cache = tmp_path / "cache"
        prepare_batches(
            settings, examples, counting.encoders(), cache=cache, seed=0, on_progress=lambda *_: None, verify=verify
        )
        return len(counting.pictures), len(counting.captions)

    assert encoded_again(False) == (7, 7)
    for kind in ("latents", "captions"):
        entry = sorted((tmp_path / "cache" / kind).rglob("*.safetensors"))[0]
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    assert encoded_again(False) == (0, 0)
    assert encoded_again(True) == (1, 1)


def test_a_large_set_read_from_disk_gives_the_same_batches(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(pictures, caption_dropout=0.3)
    held = prepare(settings, counting.encoders())
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    read = prepare(settings, counting.encoders())
    assert len(counting.pictures) == 7
    assert_same_steps(held, read, range(7))


def test_an_entry_lost_during_the_run_says_how_to_go_on(
    prepare: Prepare,
    config: MakeConfig,
    pictures: Path,
    counting: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(store, "HELD_BYTES", 0)
    batches = prepare(config(pictures), counting.encoders())
    for entry in (tmp_path / "cache").rglob("*.safetensors"):
        entry.write_bytes(b"damaged")
    with pytest.raises(UserError, match="--resume"):
        list(batches.at(0))


def test_a_dropped_caption_is_replaced_by_the_encoding_of_the_empty_one(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    batches = prepare(config(pictures, caption_dropout=0.5), counting.encoders())
    empty = counting.encode_captions([""])["pooled"][0]
    drawn = [batch for step in range(20) for batch, _ in batches.at(step)]
    flags = [caption == "" for batch in drawn for caption in batch.captions]
    assert 0.2 < sum(flags) / len(flags) < 0.8
    for batch in drawn:
        for place, caption in enumerate(batch.captions):
            assert torch.equal(batch.text["pooled"][place], empty) == (caption == "")
            assert caption in ("", batch.examples[place].caption)


def test_captions_that_the_loop_encodes_are_handed_on_as_text(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    batches = prepare(config(pictures), counting.encoders(captions=False))
    assert all(batch.text is None for batch, _ in batches.at(0))
    assert counting.captions == []


def test_equal_pictures_and_equal_captions_are_encoded_once(
    prepare: Prepare, config: MakeConfig, picture: Callable[..., None], tmp_path: Path, counting: Any
) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "same" / f"{name}.png", (64, 64), "the same")
    prepare(config(tmp_path / "same"), counting.encoders())
    assert (len(counting.pictures), len(counting.captions)) == (1, 1)


def test_global_generators_are_left_alone(prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any) -> None:
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    batches = prepare(config(pictures, caption_dropout=0.5), counting.encoders())
    for step in range(5):
        list(batches.at(step))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_all_pictures_that_cannot_be_read_are_told_together_and_what_was_encoded_stays(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    whole = {name: (pictures / name).read_bytes() for name in ("1.png", "5.png")}
    for name, content in whole.items():
        (pictures / name).write_bytes(content[:-2000])
    with pytest.raises(UserError) as caught:
        prepare(config(pictures), counting.encoders())
    assert [Path(problem.where).name for problem in caught.value.problems] == ["1.png", "5.png"]
    assert "truncated" in caught.value.text()
    assert len(counting.pictures) == 1, "after the first that cannot be read no more are encoded"
    for name, content in whole.items():
        (pictures / name).write_bytes(content)
    prepare(config(pictures), counting.encoders())
    assert len(counting.pictures) == 7


def test_a_cold_start_decodes_each_picture_once_and_a_warm_one_none(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, original = Counter[str](), PngImageFile.load

    def load(image: PngImageFile) -> Any:
        decoded.update([] if getattr(image, "counted", False) else [str(image.size)])
        image.counted = True  # type: ignore[attr-defined]
        return original(image)

    monkeypatch.setattr(PngImageFile, "load", load)
    prepare(config(pictures), counting.encoders())
    assert sum(decoded.values()) == 7
    prepare(config(pictures), counting.encoders())
    assert sum(decoded.values()) == 7


def test_a_picture_that_changed_its_size_since_the_scan_is_reported(
    config: MakeConfig, pictures: Path, counting: Any, tmp_path: Path
) -> None:
    stale = Example(pictures / "1.png", "one", 30, 40, 1)
    with pytest.raises(UserError, match="changed"):
        prepare_batches(
            config(pictures),
            [stale],
            counting.encoders(),
            cache=tmp_path / "cache",
            seed=0,
            on_progress=lambda *_: None,
        )


def test_latents_that_are_not_finite_are_refused_with_the_name_of_the_picture(
    prepare: Prepare, config: MakeConfig, pictures: Path, tmp_path: Path
) -> None:
    broken = Encoders(lambda pixels: pixels * float("nan"), None, "vae", "text", lambda sizes: {"time_ids": sizes})
    with pytest.raises(UserError, match=r"0\.png.*NaN"):
        prepare(config(pictures), broken)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_caption_encodings_that_are_not_finite_are_refused_with_the_caption(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    def broken(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"pooled": torch.full((len(captions), 4), float("inf"))}

    with pytest.raises(UserError, match=r"caption 'caption 0'.*infinity"):
        prepare(
            config(pictures), Encoders(counting.encode_pixels, broken, "vae", "text", lambda sizes: {"time_ids": sizes})
        )


def test_an_encoding_does_not_depend_on_what_else_the_cache_lacks(
    prepare: Prepare, config: MakeConfig, pictures: Path, picture: Callable[..., None], counting: Any
) -> None:
    """As with real networks, whose last bits change with the number of things that are encoded together."""

    def pixels(many: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(counting.encode_pixels(many)).float() + len(many)

    def captions(many: list[str]) -> dict[str, torch.Tensor]:
        return {"pooled": torch.full((len(many), 4), float(len(many)))}

    encoders = Encoders(pixels, captions, "vae", "text", lambda sizes: {"time_ids": sizes})
    prepare(config(pictures), encoders)
    for number in range(3):
        picture(pictures / f"{number}.png", (64, 64), f"edited {number}", seed=50 + number)
    grown, fresh = prepare(config(pictures), encoders), prepare(config(pictures), encoders, cache="fresh")
    assert_same_steps(grown, fresh, range(7))


def test_progress_ends_at_its_total(config: MakeConfig, pictures: Path, counting: Any, tmp_path: Path) -> None:
    settings = config(pictures)
    calls: list[tuple[str, int, int]] = []
    prepare_batches(
        settings,
        scan_folders(settings, decode=False)[0],
        counting.encoders(),
        cache=tmp_path / "cache",
        seed=0,
        on_progress=lambda what, done, total: calls.append((what, done, total)),
    )
    last = {what: (done, total) for what, done, total in calls}
    assert last == {
        "reading pictures": (7, 7),
        "looking at the cache": (7, 7),
        "encoding pictures": (7, 7),
        "encoding captions": (7, 7),
    }


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_a_step_has_the_same_pictures_captions_and_draws_however_many_are_computed_at_once(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, at_once: int
) -> None:
    batches = prepare(config(pictures, gradient_accumulation=4, caption_dropout=0.4), counting.encoders())

    def seen(step: int, batch_size: int | None) -> list[tuple[Any, ...]]:
        found = []
        for batch, share in batches.at(step, batch_size):
            places = [
                (piece.index, place, piece.total) for piece in batch.pieces for place in range(piece.start, piece.stop)
            ]
            assert len(places) <= (batch_size or 2)
            rows = zip(places, batch.examples, batch.captions, batch.latents, strict=True)
            found += [
                (*place, row[0].path, row[1], row[2].tolist(), round(share / len(places), 9)) for place, *row in rows
            ]
        return sorted(found, key=lambda one: one[:2])

    for step in range(6):
        assert seen(step, at_once) == seen(step, None)


def test_a_plan_outlives_another_batch_size(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any
) -> None:
    began = prepare(config(pictures, batch_size=4, gradient_accumulation=2), counting.encoders())
    settings = config(pictures, batch_size=2, gradient_accumulation=4)
    examples, _ = scan_folders(settings, decode=False)
    cache = pictures.parent / "cache"
    goes_on = prepare_batches(
        settings, examples, counting.encoders(), cache=cache, seed=0, on_progress=lambda *_: None, plan=Plan(4, 2)
    )
    for step in range(6):
        drawn = list(goes_on.at(step))
        assert max(len(batch.examples) for batch, _ in drawn) <= 2
        assert [one for batch, _ in drawn for one in batch.examples] == [
            one for batch, _ in began.at(step) for one in batch.examples
        ]


def paint(path: Path, level: int) -> None:
    Image.fromarray(np.full((64, 64, 3), level, dtype=np.uint8)).save(path)


def test_a_picture_that_is_saved_anew_before_it_is_encoded_is_refused_and_not_stored(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.data import batches

    original, first = batches.picture_digests, (pictures / "0.png").read_bytes()

    def saved_afterwards(*arguments: Any, **settings: Any) -> list[bytes]:
        digests = original(*arguments, **settings)
        paint(pictures / "0.png", 0)
        return digests

    with monkeypatch.context() as patched:
        patched.setattr(batches, "picture_digests", saved_afterwards)
        with pytest.raises(UserError, match=r"0\.png.*has changed while it was in use; start again"):
            prepare(config(pictures), counting.encoders())
    assert counting.pictures == []
    (pictures / "0.png").write_bytes(first)
    assert_cache_is_sound(prepare, config(pictures), counting)


def test_a_picture_that_is_another_one_only_while_it_is_decoded_is_not_stored_as_the_other(
    prepare: Prepare, config: MakeConfig, pictures: Path, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is decoded is what was hashed, so a file that changes in between, and back again, makes no difference."""
    from sdtrain.data import encoding

    original, first = encoding.load_pixels, (pictures / "0.png").read_bytes()

    def swapped_meanwhile(example: Example, *arguments: Any) -> torch.Tensor:
        if example.path.name != "0.png":
            return original(example, *arguments)
        paint(example.path, 0)
        pixels = original(example, *arguments)
        example.path.write_bytes(first)
        return pixels

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "load_pixels", swapped_meanwhile)
        prepare(config(pictures), counting.encoders())
    assert_cache_is_sound(prepare, config(pictures), counting)


def assert_cache_is_sound(prepare: Prepare, settings: DataConfig, counting: Any) -> None:
    cached, fresh = prepare(settings, counting.encoders()), prepare(settings, counting.encoders(), cache="fresh")
    assert_same_steps(cached, fresh, range(7))
