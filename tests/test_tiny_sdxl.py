"""The picture world, its judge, and the built-in model and pictures made from it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts import picture_world as world

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "sdtrain" / "builtin" / "tiny-sdxl"
PICTURES = ROOT / "sdtrain" / "builtin" / "quickstart"


def spoiled(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A picture as a small autoencoder would return it: blurred and noisy."""
    blurred = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5)))
    noise = rng.normal(0, rng.uniform(0, 14), (picture.height, picture.width, 3))
    return Image.fromarray((np.asarray(blurred) + noise).clip(0, 255).astype(np.uint8))


def test_the_judge_names_spoiled_pictures_right_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    scenes = [world.random_scene(rng, world.SIZES[i % 3], (*world.SHAPES, world.CONCEPT_SHAPE)) for i in range(200)]
    found = world.rates(scenes, [spoiled(world.draw(scene), rng) for scene in scenes])
    assert min(found["colour"], found["shape"], found["background"]) >= 0.99


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_the_judge_sees_nothing_on_an_empty_ground(background: str) -> None:
    empty = Image.new("RGB", (128, 128), world.BACKGROUNDS[background])
    assert world.judge(spoiled(empty, np.random.default_rng(1))) == world.Verdict("nothing", "nothing", background)


def test_the_judge_does_not_name_what_the_world_does_not_hold() -> None:
    bar = np.array([[10, 54], [118, 54], [118, 74], [10, 74]])
    verdict = world.judge(world.draw_polygon(bar, (0, 255, 255), (245, 245, 245), (128, 128)))
    assert (verdict.colour, verdict.shape, verdict.background) == ("unclear", "unclear", "white")


def test_figures_stay_inside_the_picture() -> None:
    rng = np.random.default_rng(2)
    for i in range(150):
        scene = world.random_scene(rng, world.SIZES[i % 3], (*world.SHAPES, world.CONCEPT_SHAPE))
        pixels = np.asarray(world.draw(scene))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == world.BACKGROUNDS[scene.background]).all(), scene


def test_the_base_never_reads_the_concepts_word_nor_sees_its_shape() -> None:
    rng = np.random.default_rng(3)
    scenes = [world.random_scene(rng) for _ in range(2000)]
    assert {scene.shape for scene in scenes} == set(world.SHAPES)
    assert not any(world.CONCEPT in world.random_caption(scene, rng) for scene in scenes)


def test_captions_read_like_english() -> None:
    assert world.caption("red", "circle", "white") == "a red circle on a white background"
    assert world.caption("orange", world.CONCEPT_SHAPE, "grey") == "an orange zorbit on a grey background"


def test_the_quickstart_pictures_show_what_their_captions_say() -> None:
    paths = sorted(PICTURES.glob("*.png"))
    assert len(paths) == 24
    sizes, colours, backgrounds = set(), set(), set()
    for path in paths:
        picture = Image.open(path)
        seen = world.judge(picture)
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
    assert index["force_zeros_for_empty_prompt"] is True
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


@pytest.mark.slow
def test_the_built_in_model_paints_what_it_is_asked_for(tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    script = [sys.executable, ROOT / "scripts" / "make_tiny_sdxl.py", "judge", "--json", rates]
    subprocess.run([*script, "--sheet", tmp_path / "sheet.png"], check=True)
    found = json.loads(rates.read_text())
    assert found["known"]["colour"] >= 0.9
    assert found["known"]["background"] >= 0.9
    assert found["known"]["shape"] >= 0.75
    assert found["concept"]["shape"] <= 0.1
