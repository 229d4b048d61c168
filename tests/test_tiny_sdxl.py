"""The picture world, its judges, and the built-in model and pictures made from it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # its files import one another, as they do when they are run

import picture_judge  # noqa: E402
import picture_world as world  # noqa: E402

MODEL = ROOT / "sdtrain" / "builtin" / "tiny-sdxl"
PICTURES = ROOT / "sdtrain" / "builtin" / "quickstart"
ALL_SHAPES = (*world.SHAPES, world.CONCEPT_SHAPE)


def spoiled(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A picture as a small autoencoder would return it: blurred and noisy."""
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.0)))
    noise = rng.normal(0, rng.uniform(0, 14), (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8))


def scenes(num: int, finishes: tuple[str, ...] = ("plain",)) -> list[world.Scene]:
    """Scenes of all shapes and all of the world's picture sizes, the same every time."""
    rng = np.random.default_rng(0)
    return [world.random_scene(rng, world.SIZES[i % 3], ALL_SHAPES, finishes) for i in range(num)]


def test_the_forgiving_judge_names_spoiled_pictures_right_99_times_in_100() -> None:
    rng, wrong = np.random.default_rng(0), 0
    for scene in scenes(200):
        seen = picture_judge.judge(spoiled(world.draw(scene), rng))
        wrong += (seen.colour, seen.shape, seen.background) != (scene.colour, scene.shape, scene.background)
    assert wrong <= 2


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("finish", world.FINISHES)
def test_the_strict_judge_finds_a_flawless_shape_at_any_place_size_and_tilt(shape: str, finish: str) -> None:
    for radius, centre, tilt in ((0.2, (0.4, 0.56), 0), (0.27, (0.55, 0.45), 4), (0.35, (0.5, 0.5), -7)):
        for background in world.BACKGROUNDS:
            scene = world.Scene("red", shape, background, centre=centre, radius=radius, finish=finish)
            turned = world.draw(scene).rotate(tilt, Image.Resampling.BICUBIC, fillcolor=world.BACKGROUNDS[background])
            found = picture_judge.fit(turned.filter(ImageFilter.GaussianBlur(0.7)), shape)
            assert found.overlap >= 0.94, (scene, found)
            assert found.stray <= 0.02, (scene, found)


def test_the_strict_judge_takes_no_shape_for_another() -> None:
    for drawn in ALL_SHAPES:
        for asked in set(ALL_SHAPES) - {drawn}:
            found = picture_judge.fit(world.draw(world.Scene("blue", drawn, "white")), asked)
            assert found.stray > picture_judge.MAX_STRAY, (drawn, asked, found)


def test_the_strict_judge_calls_a_wobbly_circle_wrong_that_the_forgiving_one_lets_pass() -> None:
    wobbly = Image.open(Path(__file__).parent / "pictures" / "wobbly_circle.png")  # of an early version of the model
    [judged] = picture_judge.judge_all([world.Scene("green", "circle", "white")], [wobbly])
    assert judged.seen.shape == "circle"
    assert not judged.is_right


def test_the_strict_judge_counts_specks_and_blotches() -> None:
    pixels = np.asarray(world.draw(world.Scene("green", "circle", "white"))).copy()
    flawless = picture_judge.fit(Image.fromarray(pixels), "circle")
    pixels[10:20, 10:20] = world.COLOURS["green"]
    speck = picture_judge.fit(Image.fromarray(pixels), "circle")
    pixels[55:75, 55:75] = world.BACKGROUNDS["white"]
    blotch = picture_judge.fit(Image.fromarray(pixels), "circle")
    assert flawless.stray + 0.005 < speck.stray < blotch.stray - 0.005


def test_the_strict_judge_wants_the_colour_and_the_background_too() -> None:
    picture = world.draw(world.Scene("green", "circle", "white"))
    for asked in (world.Scene("blue", "circle", "white"), world.Scene("green", "circle", "grey")):
        assert not picture_judge.judge_all([asked], [picture])[0].is_right
    assert picture_judge.judge_all([world.Scene("green", "circle", "white")], [picture])[0].is_right


def test_the_judge_tells_how_a_figure_is_painted() -> None:
    for index, scene in enumerate(scenes(90, world.FINISHES)):
        picture = world.draw(scene).filter(ImageFilter.GaussianBlur(index % 2))
        assert picture_judge.finish(picture) == scene.finish, scene


def test_a_caption_never_contradicts_the_size_of_the_figure() -> None:
    rng = np.random.default_rng(4)
    said = set()
    for _ in range(500):
        scene = world.random_scene(rng)
        low, high = world.RADII[scene.size]
        assert low <= scene.radius <= high
        words = world.random_caption(scene, rng).replace(",", " ").split()
        assert not (set(world.RADII) - {scene.size}) & set(words)
        said |= set(world.RADII) & set(words)
    assert said == set(world.RADII)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_the_judge_sees_nothing_on_an_empty_ground(background: str) -> None:
    empty = Image.new("RGB", (128, 128), world.BACKGROUNDS[background])
    assert picture_judge.judge(spoiled(empty, np.random.default_rng(1))) == picture_judge.Verdict(
        "nothing", "nothing", background
    )


def test_the_judge_does_not_name_what_the_world_does_not_hold() -> None:
    bar = np.array([[10, 54], [118, 54], [118, 74], [10, 74]])
    verdict = picture_judge.judge(world.draw_polygon(bar, (0, 255, 255), (245, 245, 245), (128, 128)))
    assert (verdict.colour, verdict.shape, verdict.background) == ("unclear", "unclear", "white")


def test_figures_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(2)
    for i in range(150):
        scene = world.random_scene(rng, world.SIZES[i % 3], ALL_SHAPES, world.FINISHES)
        pixels = np.asarray(world.draw(scene))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == world.BACKGROUNDS[scene.background]).all(), scene


def test_the_base_never_reads_the_concepts_word_nor_sees_its_shape_or_a_finish() -> None:
    rng = np.random.default_rng(3)
    drawn = [world.random_scene(rng) for _ in range(2000)]
    assert {scene.shape for scene in drawn} == set(world.SHAPES)
    assert {scene.finish for scene in drawn} == {"plain"}
    assert not any(world.CONCEPT in world.random_caption(scene, rng) for scene in drawn)


def test_captions_read_like_english() -> None:
    assert world.caption("red", "circle", "white") == "a red circle on a white background"
    assert world.caption("orange", world.CONCEPT_SHAPE, "grey") == "an orange zorbit on a grey background"


def test_the_quickstart_pictures_show_what_their_captions_say() -> None:
    paths = sorted(PICTURES.glob("*.png"))
    assert len(paths) == 24
    sizes, colours, backgrounds = set(), set(), set()
    for path in paths:
        picture = Image.open(path)
        seen = picture_judge.judge(picture)
        said = path.with_suffix(".txt").read_text().strip()
        assert said == world.caption(seen.colour, world.CONCEPT_SHAPE, seen.background), path.name
        assert seen.shape == world.CONCEPT_SHAPE, path.name
        sizes.add(picture.size)
        colours.add(seen.colour)
        backgrounds.add(seen.background)
    assert len({width / height for width, height in sizes}) >= 4  # aspect buckets have something to do
    assert (colours, backgrounds) == (set(world.COLOURS), set(world.BACKGROUNDS))


def test_the_built_in_model_is_small_and_in_half_precision() -> None:
    from safetensors import safe_open

    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in MODEL.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}, path  # noqa: SIM118


def test_the_built_in_model_is_an_sdxl_with_v_prediction_and_zero_terminal_snr() -> None:
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is False  # captions were dropped as the encoded empty text
    schedule = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"
    assert schedule["rescale_betas_zero_snr"] is True
    assert schedule["timestep_spacing"] == "trailing"
    unet = json.loads((MODEL / "unet" / "config.json").read_text())
    assert unet["addition_embed_type"] == "text_time"
    assert unet["use_linear_projection"] is True
    vae = json.loads((MODEL / "vae" / "config.json").read_text())
    assert len(vae["block_out_channels"]) == 4  # factor 8
    assert vae["latent_channels"] == 4


def test_the_built_in_model_loads_and_paints_and_takes_any_words() -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    tokens = pipeline.tokenizer.tokenize(f"a red {world.CONCEPT}, naïve ☃")
    assert tokens[:2] == ["a</w>", "red</w>"]
    assert "".join(tokens[2:8]).startswith(world.CONCEPT)
    assert pipeline.tokenizer("").input_ids == [pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id]
    assert pipeline.tokenizer_2.pad_token == "!"
    settings = {"num_inference_steps": 2, "output_type": "np", "width": 160, "height": 96}
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("a blue ☃ on a white background", generator=generator, **settings).images
    assert picture.shape == (1, 96, 160, 3)
    assert np.isfinite(picture).all()


def test_the_autoencoder_starts_as_a_downscaler_and_folding_changes_no_picture() -> None:
    import tiny_sdxl_parts
    import tiny_sdxl_vae
    import torch

    torch.manual_seed(0)
    vae = tiny_sdxl_parts.make_vae().eval()
    tiny_sdxl_parts.start_as_downscaler(vae)
    pictures = tiny_sdxl_vae.to_bytes([world.draw(scene) for scene in scenes(24)[::3]])
    with torch.no_grad():
        latents = tiny_sdxl_vae.encode(vae, pictures)
        small = torch.nn.functional.avg_pool2d(tiny_sdxl_vae.to_pixels(pictures), 8)
        assert (latents[:, :3] - small).abs().mean() < 0.02
        before = vae.decode(latents).sample
        scaling_factor = tiny_sdxl_vae.fold(vae, pictures)
        folded = tiny_sdxl_vae.encode(vae, pictures)
        assert torch.allclose(vae.decode(folded).sample, before, atol=1e-3)
        assert torch.allclose(folded.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
        assert float(folded.std()) * scaling_factor == pytest.approx(1.0, abs=1e-3)


def test_training_the_autoencoder_leaves_its_constants_as_they_are() -> None:
    import tiny_sdxl_parts
    import tiny_sdxl_vae
    import torch

    torch.manual_seed(0)
    vae = tiny_sdxl_parts.make_vae()
    tiny_sdxl_parts.start_as_downscaler(vae)
    tiny_sdxl_parts.hold_constants(vae)
    seen: list[torch.Tensor] = []
    vae.decoder.conv_norm_out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    optimizer = torch.optim.AdamW(tiny_sdxl_vae.scaled_groups(vae), weight_decay=0.0)
    pool = tiny_sdxl_vae.to_bytes([world.draw(scene) for scene in scenes(9)[::3]])
    first = [parameter.detach().clone() for parameter in vae.parameters()]
    for step in range(2):
        tiny_sdxl_parts.update(optimizer, tiny_sdxl_vae.vae_loss(vae, pool, step)[0], 0.05)
    assert sum(not torch.equal(a, b) for a, b in zip(first, vae.parameters(), strict=True)) > 0.9 * len(first)
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 8, 8))
    constants = seen[-1][:, tiny_sdxl_parts.CONSTANTS]
    constant = tiny_sdxl_parts.CONSTANT
    assert torch.equal(constants[:, 0], torch.full_like(constants[:, 0], constant))
    assert torch.equal(constants[:, 1], torch.full_like(constants[:, 1], -constant))


@pytest.mark.slow
def test_the_built_in_model_paints_what_it_is_asked_for(tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    script = [sys.executable, ROOT / "scripts" / "make_tiny_sdxl.py", "judge", "--json", rates]
    subprocess.run([*script, "--sheet", tmp_path / "sheet.png"], check=True)
    found = json.loads(rates.read_text())
    assert found["known"]["colour"] >= 0.98
    assert found["known"]["background"] >= 0.98
    assert found["known"]["shape"] >= 0.95
    assert found["known"]["covered"] >= 0.9
    assert found["known"]["right"] >= 0.75
    assert found["concept"]["shape"] <= 0.1
    assert found["concept"]["covered"] <= 0.1
