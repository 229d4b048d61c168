"""`sdtrain sample`: its options mean the settings of previews, and all that is wrong with them is told at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image, ImageChops
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands import sample as sample_command
from sdtrain.commands.front.drawing import may_be_packed
from sdtrain.commands.sample import draw, sample_to_files
from sdtrain.diffusion.words import Sampler
from sdtrain.errors import UserError
from sdtrain.families.metadata import CONFIG_KEY

Train = Callable[..., tuple[Path, str]]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command hands on: prompts, seeds, overrides and LoRAs."""
    calls: list[tuple[Any, ...]] = []

    def called(source: Path, prompts: Any, seeds: Any, out: Any, overrides: Any, console: Console, **how: Any) -> None:
        calls.append((prompts, list(seeds), overrides, how["loras"]))

    monkeypatch.setattr("sdtrain.commands.sample.sample_to_files", called)
    return calls


def asked(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["sample", "runs/a", *arguments]).exception


def told(*arguments: str) -> dict[str, str]:
    error = asked(*arguments)
    assert isinstance(error, UserError), error
    return {problem.where: problem.what for problem in error.problems}


def test_options_are_settings_of_the_previews(handed: list[tuple[Any, ...]]) -> None:
    options = ["--size", "832x1216", "--steps", "7", "--guidance", "3.5", "--sampler", "euler_a", "--negative", 'a "b"']
    assert asked("--prompt", "a cat", *options, "--set", "preview.sampler=unipc") is None
    assert asked("--prompt", "a cat", "--size", "1024") is None
    (prompts, seeds, overrides, loras), (_, _, square, _) = handed
    assert (prompts, seeds, loras) == (["a cat"], [0, 1, 2, 3], [])
    assert set(overrides) == {
        "preview.sampler=unipc",
        "preview.width_px=832",
        "preview.height_px=1216",
        "preview.num_inference_steps=7",
        "preview.guidance_scale=3.5",
        "preview.sampler=euler_a",
        'preview.negative_prompt="a \\"b\\""',
    }
    assert square == ["preview.width_px=1024", "preview.height_px=1024"]


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        ([], [0, 1, 2, 3]),
        (["--count", "2"], [0, 1]),
        (["--count", "3", "--seed", "7"], [7, 8, 9]),
        (["--seed", "7", "--seed", "5"], [7, 5]),
    ],
)
def test_seeds_are_named_or_counted(handed: list[tuple[Any, ...]], options: list[str], seeds: list[int]) -> None:
    assert asked("--prompt", "a cat", *options) is None
    assert handed[0][1] == seeds


def test_prompts_stand_in_a_file_a_line_each(handed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n# not this\n  a größer dog  \n".encode())
    assert asked("--prompt", "first", "--prompt-file", str(file)) is None
    assert handed[0][0] == ["first", "a cat", "a größer dog"]


def test_all_that_is_wrong_is_told_at_once(handed: list[tuple[Any, ...]], tmp_path: Path) -> None:
    found = told(
        "--size", "big", "--seed", "1", "--seed", "2", "--count", "3", "--lora", "a", "--weight", "1", "--weight", "2"
    )
    assert set(found) == {"--prompt", "--size", "--count", "--weight"}
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "holds no prompt" in told("--prompt-file", str(tmp_path / "empty.txt"))["--prompt-file"]
    assert "not text in UTF-8" in told("--prompt-file", str(tmp_path / "bytes.txt"))["--prompt-file"]
    assert "No such file" in told("--prompt-file", str(tmp_path / "none.txt"))["--prompt-file"]
    assert "no size" in told("--prompt", "x", "--size", "0x64")["--size"]
    assert not handed


def difference(one: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def test_loras_are_added_each_times_its_weight(train: Train, tmp_path: Path) -> None:
    run, _ = train({"optimizer.d0": 0.05})
    other, _ = train({"name": "other", "optimizer.d0": 0.05, "seed": 5})
    file = other / "weights" / "other.safetensors"
    overrides = ["preview.num_inference_steps=2", "preview.width_px=64", "preview.height_px=64"]

    def drawn(source: Path, *loras: tuple[Path, float], step: int | None = None) -> Image.Image:
        return draw(source, ["a red circle"], [0], step, overrides, loras).rows[0][0]

    plain = drawn(run)
    assert difference(plain, drawn(run, (file, 0.0))) == 0
    assert difference(plain, drawn(run, (file, 1.0))) > 3
    twice, halves = drawn(run, (file, 1.0)), drawn(run, (file, 0.5), (file, 0.5))
    assert difference(twice, halves) <= 1
    assert difference(twice, drawn(run, (file, 1.0), step=4)) <= 1, "a training state is the same as its weights"
    assert difference(plain, drawn(run, (file, 1.0), (file, -1.0))) <= 1
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        drawn(run, (tmp_path / "nothing.safetensors", 1.0))


def test_what_of_a_lora_cannot_be_used_is_left_out_if_asked(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1})
    tensors = load_file(run / "weights" / f"{run.name}.safetensors")
    lora, whole = tmp_path / "more.safetensors", tmp_path / "whole.safetensors"
    save_file(tensors, whole)
    save_file(tensors | {"bundle_emb.zorbit.string_to_param.*": torch.ones(2, 64)}, lora)
    arguments = ["sample", str(run), "--prompt", "a cat", "--count", "1", "--size", "64", "--steps", "1"]
    refused = CliRunner().invoke(app, [*arguments, "--lora", str(lora)]).exception
    assert isinstance(refused, UserError) and "text embedding" in str(refused) and "--partial" in str(refused)
    done = CliRunner().invoke(app, [*arguments, "--lora", str(lora), "--partial"])
    assert "left out: bundle_emb.zorbit" in done.output and done.exit_code == 0
    picture = run / "samples" / "prompt-00-seed-0.png"
    drawn = Image.open(picture).convert("RGB")
    assert CliRunner().invoke(app, [*arguments, "--lora", str(whole)]).exit_code == 0
    assert difference(drawn, Image.open(picture).convert("RGB")) == 0


def words_of(path: Path) -> tuple[str, dict[str, Any]]:
    with Image.open(path) as picture:
        told = picture.text  # type: ignore[attr-defined]
    return told["parameters"], json.loads(told["sdtrain parameters"])


def test_a_picture_says_what_it_was_drawn_from(train: Train, tmp_path: Path) -> None:
    """As A1111's text, which others read, and as JSON, of which the same picture can be drawn again."""
    run, _ = train({"steps": 2, "preview.every": 1, "preview.prompts": ["a cat"], "preview.seeds": [4]})
    lora = run / "weights" / f"{run.name}.safetensors"
    how = ["preview.width_px=64", "preview.height_px=96", "preview.sampler=dpmpp_2m_karras"]
    how += ["preview.num_inference_steps=3", "preview.guidance_scale=2.5", 'preview.negative_prompt="a dog"']
    out = tmp_path / "out"
    asked_for = (["a cat", "a big\nowl"], [7, 9])
    sample_to_files(run, *asked_for, out, how, Console(quiet=True), step=2, loras=[(lora, 0.5)])
    text, told = words_of(out / "prompt-01-seed-9.png")
    assert text == (
        "a big\\nowl\nNegative prompt: a dog\nSteps: 3, Sampler: DPM++ 2M Karras, CFG scale: 2.5, Seed: 9, "
        f"Size: 64x96, Model: {run.name}, Training step: 2, Lora: {lora.stem} 0.5"
    )
    assert told["base"] == "builtin:tiny-sdxl" and str(tmp_path) not in json.dumps(told)
    assert words_of(out / "grid.png")[1] == told | {"prompts": asked_for[0], "seeds": asked_for[1]}
    again = [f"preview.{key}={told[key]}" for key in ("num_inference_steps", "sampler", "width_px", "height_px")]
    again += [
        f"preview.guidance_scale={told['guidance_scale']}",
        f'preview.negative_prompt="{told["negative_prompt"]}"',
    ]
    (name, weight), *_ = told["loras"]
    [[picture]] = draw(run, told["prompts"], told["seeds"], told["step"], again, [(lora.with_stem(name), weight)]).rows
    with Image.open(out / "prompt-01-seed-9.png") as first:
        assert difference(first.convert("RGB"), picture) <= 1, "drawn among four pictures, or alone"
    for name, step in (("base", 0), ("step-000001", 1), ("step-000002", 2)):
        text, told = words_of(run / "previews" / f"{name}.png")
        assert text.startswith("a cat\n") and f"Seed: 4, Size: {told['width_px']}x{told['height_px']}" in text
        assert (told["prompts"], told["seeds"], told["step"], told["run"]) == (["a cat"], [4], step, run.name)


def test_a_size_and_a_sampler_are_drawn_with(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1})
    overrides = ["preview.width_px=64", "preview.height_px=96", "preview.sampler=euler_a"]
    sample_to_files(run, ["a cat"], [0], tmp_path / "out", overrides, Console(quiet=True))
    with Image.open(tmp_path / "out" / "prompt-00-seed-0.png") as picture:
        assert picture.size == (64, 96)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_how_far_it_is_is_shown_to_the_last_picture(train: Train, sampler: str) -> None:
    run, _ = train({"steps": 1})
    seen: list[tuple[str, int, int]] = []
    wanted = ["preview.num_inference_steps=3", f"preview.sampler={sampler}"]
    draw(run, ["a red circle", "a dog"], [0, 1], None, wanted, on_progress=lambda *far: seen.append(far))
    assert [done for _, done, _ in seen] == list(range(1, len(seen) + 1)), "it never stands still"
    assert {(what, total) for what, _, total in seen} == {("drawing", len(seen))}


def test_a_picture_says_what_it_was_drawn_from_in_the_words_of_others(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1})
    wanted = ["preview.sampler=dpmpp_2m_karras", 'preview.negative_prompt="blurred"', "preview.guidance_scale=3.5"]
    written = sample_to_files(run, ["a [red] circle", "a dog"], [7], tmp_path / "drawn", wanted, Console(quiet=True))
    assert [path.name for path in written] == ["prompt-00-seed-7.png", "prompt-01-seed-7.png", "grid.png"]
    with Image.open(written[0]) as picture:
        words = picture.text["parameters"]  # type: ignore[attr-defined]
    assert words == (
        "a [red] circle\nNegative prompt: blurred\n"
        "Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3.5, Seed: 7, Size: 96x96, Model: small, Training step: 1"
    )


SMALL = ["preview.num_inference_steps=2", "preview.width_px=64", "preview.height_px=64"]


@pytest.mark.parametrize("step", [None, pytest.param(4, marks=pytest.mark.slow)], ids=["file", "state"])
def test_strength_0_is_the_base_1_is_all_and_a_half_lies_between(train: Train, step: int | None) -> None:
    run, _ = train({"optimizer.d0": 0.02})

    def drawn(strength: float) -> Image.Image:
        return draw(run, ["a red circle"], [0], step, SMALL, strength=strength).rows[0][0]

    run_of_nothing, _ = train({"name": "nothing", "steps": 1, "optimizer.d0": 1e-30})
    base = draw(run_of_nothing, ["a red circle"], [0], None, SMALL).rows[0][0]
    assert difference(base, drawn(0)) <= 1
    whole = difference(base, drawn(1))
    assert whole > 3 and 0 < difference(base, drawn(0.5)) < whole
    twice = (run / "weights" / "small.safetensors", 0.5)
    halves = draw(run, ["a red circle"], [0], step, SMALL, [twice], strength=0.5).rows[0][0]
    assert difference(halves, drawn(1)) <= 1


def test_a_file_that_does_not_name_its_base_is_drawn_with_the_one_that_is_named(train: Train, tmp_path: Path) -> None:
    run, _ = train({"optimizer.d0": 0.05, "data.resolution_px": 128})
    weights, foreign = run / "weights" / "small.safetensors", tmp_path / "of [others].safetensors"
    save_file(load_file(weights), foreign)
    ours = draw(weights, ["a red circle"], [0], None, SMALL)
    theirs = draw(foreign, ["a red circle"], [0], None, SMALL, base="builtin:tiny-sdxl")
    assert theirs.title == "of-others"
    made_for = sample_command._config(foreign, ["a"], [], "builtin:tiny-sdxl")
    assert made_for.data.resolution_px == 128, "what the model was made for"
    assert difference(ours.rows[0][0], theirs.rows[0][0]) == 0
    with pytest.raises(UserError, match=r"--base +is missing: of \[others\]\.safetensors does not say") as told:
        draw(foreign, ["a red circle"], [0], None, SMALL)
    assert told.value.exit_code == 2
    with pytest.raises(UserError, match=r"the base model of a run is known"):
        draw(run, ["a red circle"], [0], None, SMALL, base="builtin:tiny-sdxl")


def test_a_merged_model_is_drawn_and_a_whole_model_has_no_strength(train: Train, tmp_path: Path) -> None:
    run, _ = train({"optimizer.d0": 0.05})
    weights, merged = run / "weights" / "small.safetensors", tmp_path / "merged.safetensors"
    assert CliRunner().invoke(app, ["merge", "builtin:tiny-sdxl", str(weights), "--out", str(merged)]).exit_code == 0
    ours = draw(weights, ["a red circle"], [0], None, SMALL).rows[0][0]
    theirs = draw(merged, ["a red circle"], [0], None, SMALL, base="builtin:tiny-sdxl").rows[0][0]
    assert difference(ours, theirs) <= 2, "weights that were merged and stored differ by rounding"
    with pytest.raises(UserError, match=r"--strength +is for adapters"):
        draw(merged, ["a red circle"], [0], None, SMALL, base="builtin:tiny-sdxl", strength=0.5)


def test_a_whole_model_without_tokenizers_says_what_names_them(train: Train, tmp_path: Path) -> None:
    run, _ = train({"steps": 1})
    weights, merged = run / "weights" / "small.safetensors", tmp_path / "merged.safetensors"
    assert CliRunner().invoke(app, ["merge", "builtin:tiny-sdxl", str(weights), "--out", str(merged)]).exit_code == 0
    with pytest.raises(UserError) as told:
        draw(merged, ["a red circle"], [0], None, SMALL)
    said = " ".join(str(told.value).split())
    assert "a single file holds none: name a folder" in said, "and not that the file is a folder without any"
    assert "--base names a model to take them from" in said


def test_strength_and_base_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: dict[str, Any] = {}
    monkeypatch.setattr("sdtrain.commands.sample.sample_to_files", lambda *given, **how: handed.update(how))
    assert asked("--prompt", "a", "--strength", "0.5", "--base", "a model", "--step", "3") is None
    assert handed == {"step": 3, "loras": [], "partial": False, "strength": 0.5, "base": "a model"}


@pytest.mark.parametrize(
    ("settings", "overrides", "may_be"),
    [
        ('base_precision = "full"', [], False),
        ('base_precision = "full"', ["model.dtype='float32'"], False),
        ('base_precision = "full"', ["model.base_precision='nf4'"], True),
        ('base_precision = "int8"', [], True),
        (None, [], True),
    ],
)
def test_a_glance_tells_whether_a_base_may_be_quantised(
    tmp_path: Path, settings: str | None, overrides: list[str], may_be: bool
) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, file, metadata={} if settings is None else {CONFIG_KEY: settings})
    if settings is not None:
        (tmp_path / "config.toml").write_text(settings, encoding="utf-8")
    assert may_be_packed(tmp_path, overrides) == may_be
    assert may_be_packed(file, overrides) == may_be
    assert may_be_packed(tmp_path / "absent.safetensors", overrides)
