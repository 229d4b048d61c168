"""What is told of pictures that can be used and may not be what was meant: each thing once, with names."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdtrain.config.schema import DataConfig, FolderConfig
from sdtrain.data.batches import Batches
from sdtrain.data.examples import Example, scan_folders
from sdtrain.data.placing import placements_of
from sdtrain.data.report.alike import find_alike
from sdtrain.data.report.facts import fact_lines
from sdtrain.data.report.names import MAX_NAMES, names_of, shown_text
from sdtrain.data.report.notes import batch_notes, caption_notes, picture_notes
from sdtrain.data.report.summary import summarise

MakeConfig = Callable[..., DataConfig]
MakePicture = Callable[..., None]


def example(name: str, caption: str = "a thing", size: tuple[int, int] = (64, 64), **more: Any) -> Example:
    return Example(Path(name), caption, *size, 1, **more)


def photograph(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Soft colours and edges everywhere, like a photograph; no two seeds alike."""
    fields = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)


def scanned(config: DataConfig, *, decode: bool = True) -> list[Example]:
    examples, problems = scan_folders(config, decode=decode)
    assert not problems
    return examples


def alike_names(folder: Path, config: MakeConfig) -> list[tuple[set[str], bool]]:
    examples = scanned(config(FolderConfig(path=str(folder), missing_captions="empty")))
    return [({one.path.name for one in group.examples}, group.is_exact) for group in find_alike(examples)]


def test_a_picture_in_another_size_format_or_turn_is_found_and_others_are_not(
    tmp_path: Path, config: MakeConfig
) -> None:
    for seed in range(30):
        photograph(seed).save(tmp_path / f"{seed}.png")
    photograph(3).resize((150, 100)).save(tmp_path / "small.png")
    photograph(3).save(tmp_path / "poor.jpg", quality=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(5).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif)
    shutil.copy(tmp_path / "9.png", tmp_path / "copy.png")
    assert alike_names(tmp_path, config) == [
        ({"3.png", "small.png", "poor.jpg"}, False),
        ({"5.png", "turned.jpg"}, False),
        ({"9.png", "copy.png"}, True),
    ]


def test_drawings_on_white_are_only_alike_where_they_are_the_same(tmp_path: Path, config: MakeConfig) -> None:
    for name, colour in (("red", (220, 30, 30)), ("green", (30, 160, 60))):
        for shape in ("ellipse", "rectangle"):
            picture = Image.new("RGB", (160, 160), "white")
            getattr(ImageDraw.Draw(picture), shape)((50, 40, 110, 120), fill=colour)
            picture.save(tmp_path / f"{name} {shape}.png")
    for level in (250, 253, 255):
        Image.new("RGB", (100, 100), (level, level, level)).save(tmp_path / f"plain {level}.png")
    Image.open(tmp_path / "red ellipse.png").resize((120, 120)).save(tmp_path / "smaller.png")
    assert alike_names(tmp_path, config) == [({"red ellipse.png", "smaller.png"}, False)]


def test_the_embedded_drawings_have_no_copies(config: MakeConfig) -> None:
    """They are hard: small shapes of a few kinds and colours on plain ground."""
    assert find_alike(scanned(config(FolderConfig(path="builtin:quickstart-known")))) == []


def test_many_pictures_are_compared_in_a_moment() -> None:
    from sdtrain.data.scanning.looks import Look

    random = np.random.default_rng(0)
    examples = []
    for number in range(5000):
        edges = int(random.integers(0, 1 << 62)) & int(random.integers(0, 1 << 62)) & int(random.integers(0, 1 << 62))
        look = Look(number.to_bytes(16, "little"), edges, 40, random.bytes(192), False)
        examples.append(example(f"{number}.png", look=look))
    assert find_alike(examples) == []


def test_transparent_pictures_are_named_and_opaque_ones_with_an_alpha_channel_are_not(
    tmp_path: Path, config: MakeConfig
) -> None:
    for name, alpha in (("clear", 100), ("opaque", 255)):
        picture = photograph(len(name)).convert("RGBA")
        picture.putalpha(alpha)
        picture.save(tmp_path / f"{name}.png")
    palette = Image.new("P", (80, 80), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    examples = scanned(config(FolderConfig(path=str(tmp_path), missing_captions="empty")))
    (note,) = [note for note in picture_notes(examples, summarise(examples, config(tmp_path))) if "white" in note]
    assert "2 pictures" in note and "clear.png" in note and "palette.png" in note and "opaque" not in note


def test_enlarged_and_hard_cropped_pictures_are_named_with_their_numbers(config: MakeConfig) -> None:
    examples = [example("small.png", size=(32, 32)), example("long.png", size=(640, 64)), example("fits.png")]
    settings = config(Path("unused"), max_aspect=2.0)
    notes = picture_notes(examples, summarise(examples, settings))
    assert [note.split(":")[0] for note in notes] == ["cropped hard", "enlarged"]
    assert "long.png 83%" in notes[0] and "small.png 2.00x" in notes[1] and "fits" not in "".join(notes)


def test_a_long_list_of_names_is_cut_and_counted() -> None:
    examples = [example(f"{number}.png") for number in range(MAX_NAMES + 12)]
    assert names_of(examples).endswith("5.png and 12 more")
    assert names_of(examples[:2], ["1x", "2x"]) == "0.png 1x, 1.png 2x"


def test_names_cannot_colour_or_break_the_terminal() -> None:
    assert shown_text("a\x1b[31mb\nc\udcff") == "a\\x1b[31mb\\nc\\udcff"
    assert names_of([example("caf\u00e9 \U0001f98a.png")]) == "caf\u00e9 \U0001f98a.png"


def test_ragged_batches_are_told_with_what_helps(config: MakeConfig) -> None:
    sizes = [(64, 64)] * 4 + [(80, 50), (50, 80)]
    examples = [example(f"{number}.png", size=size) for number, size in enumerate(sizes)]
    settings = config(Path("unused"), batch_size=4)
    (note,) = batch_notes(examples, settings, summarise(examples, settings))
    assert "3, of 2.0 pictures on average where 4 were asked for" in note
    assert "alone: 4.png, 5.png" in note and 'data.ragged = "merge" makes' in note
    full = config(Path("unused"), batch_size=1)
    assert batch_notes(examples, full, summarise(examples, full)) == []


def test_what_is_advised_keeps_its_promise(config: MakeConfig) -> None:
    settings = config(Path("unused"), batch_size=4)
    examples = [example(f"{number}.png", size=size) for number, size in enumerate([(64, 64)] * 3 + [(64, 56)])]
    (note,) = batch_notes(examples, settings, summarise(examples, settings))
    promised = note.split('data.ragged = "merge" makes ')[1].split(",")[0]
    merged = summarise(examples, settings.model_copy(update={"ragged": "merge"}))
    assert promised == f"{merged.num_batches} of {merged.mean_batch:.1f}"


def test_merging_leaves_no_picture_alone_and_moves_no_other(
    config: MakeConfig, pictures: Path, prepare: Callable[..., Batches], counting: Any
) -> None:
    settings = config(pictures, ragged="merge")
    examples = scanned(settings)
    before = placements_of(examples, config(pictures))
    after = placements_of(examples, settings)
    in_use = Counter(placement.bucket for placement in before)
    counts = Counter(placement.bucket for placement in after)
    assert min(counts.values()) >= 2
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert moved and all(in_use[old.bucket] == 1 and new.bucket in in_use for old, new in moved)
    batches = prepare(settings, counting.encoders())
    for step in range(round(batches.steps_per_epoch)):
        for batch, _ in batches.at(step):
            assert batch.latents.shape[0] == len(batch.examples)
    report = summarise(examples, settings)
    note = batch_notes(examples, settings, report)[-1]
    assert f"moved: {len(moved)} picture" in note and "cropped" in note and report.alone == ()


def test_a_single_picture_merges_with_nothing(config: MakeConfig) -> None:
    settings = config(Path("unused"), ragged="merge")
    assert len(placements_of([example("a.png")], settings)) == 1


def test_epochs_that_the_steps_are_are_told(config: MakeConfig) -> None:
    report = summarise([example(f"{number}.png") for number in range(4)], config(Path("unused"), batch_size=2))
    assert "epochs: 100 steps are 50.0, so a picture is seen about 50 times" in fact_lines(report, 100)


@pytest.mark.parametrize(
    ("caption", "signs"),
    [
        ("a {red|blue} cat", ["{red|blue} (wildcards)"]),
        ("a (red:1.3) cat", ["(red:1.3) (weights)"]),
        ("<lora:x:0.8> cat", ["<lora:x:0.8> (extra networks)"]),
        ("a __colour__ cat", ["__colour__ (names of wildcard files)"]),
        ("a cat (black, 2:1 format) <3 {x} a_b [sic] snake__case", []),
    ],
)
def test_signs_of_other_tools_are_told(config: MakeConfig, caption: str, signs: list[str]) -> None:
    notes = caption_notes([example("a.png", caption)], config(Path("unused")))
    assert len(notes) == len(signs) and all(sign in note for sign, note in zip(signs, notes, strict=True))


def test_wildcards_that_are_read_are_not_told(config: MakeConfig, tmp_path: Path) -> None:
    photograph(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a {red|blue} cat")
    settings = config(FolderConfig(path=str(tmp_path), wildcards=True))
    assert caption_notes(scanned(settings), settings) == []


def test_a_trigger_that_stands_in_no_caption_is_told(config: MakeConfig, pictures: Path) -> None:
    for trigger, told in (("sks", 1), ("caption", 0), ("CAPTION 3", 0)):
        settings = config(FolderConfig(path=str(pictures), trigger=trigger))
        notes = caption_notes(scanned(settings), settings)
        assert len(notes) == told and all("no caption of data.folder[0]" in note for note in notes)


def test_missing_captions_point_at_what_stands_beside(config: MakeConfig, tmp_path: Path) -> None:
    photograph(0).save(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("a cat")
    settings = config(FolderConfig(path=str(tmp_path), missing_captions="empty"))
    (note,) = caption_notes(scanned(settings), settings)
    assert note.startswith("no caption: 1 picture: a.png") and 'captions = "caption"' in note
    filled = config(FolderConfig(path=str(tmp_path), missing_captions="empty", trigger="sks"))
    notes = caption_notes(scanned(filled), filled)
    assert notes[0].startswith("no caption, but for what its folder adds: 1 picture: a.png")


def test_joined_lines_lone_commas_and_folders_named_for_repeats_are_told(
    config: MakeConfig, tmp_path: Path, picture: MakePicture
) -> None:
    picture(tmp_path / "10_sks dog" / "a.png", (64, 64), "one\ntwo")
    picture(tmp_path / "10_sks dog" / "b.png", (64, 64), ",")
    settings = config(tmp_path)
    notes = caption_notes(scanned(settings), settings)
    assert [note.split(":")[0] for note in notes] == ["no words", "lines", "folders"]
    asked = config(FolderConfig(path=str(tmp_path), folder_names="repeats_concept", caption_lines="drawn"))
    assert [note.split(":")[0] for note in caption_notes(scanned(asked), asked)] == ["no words"]
