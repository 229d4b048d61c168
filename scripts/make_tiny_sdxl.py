"""Makes and judges the built-in model `tiny-sdxl`, an SDXL in miniature that paints the picture world.

    python scripts/make_tiny_sdxl.py all               everything from nothing into sdtrain/builtin/
    python scripts/make_tiny_sdxl.py judge             how often colour, background and shape are right
    python scripts/make_tiny_sdxl.py judge --lora F    the same with a LoRA, and how often the concept is

`all` runs vae, text, pictures, train, release and quickstart-pictures in this order. Each keeps what it made in
build/tiny-sdxl and goes on from there when it is started again. The U-Net is trained from random weights by sdtrain
itself, as anybody would: a full fine-tune with the config configs/tiny_sdxl.toml, whose run is in build/tiny-sdxl/runs.

Three choices make little time enough. The autoencoder starts as a plain downscaler, so its latents are small pictures
from the first minute. The text encoders are trained alone and frozen afterwards, so their outputs are computed once per
caption. With v-prediction and zero terminal SNR flat colours come right at once.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import picture_judge
import picture_world as world
import tiny_sdxl_parts as parts
import torch
import typer
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tiny_sdxl_text import train_text
from tiny_sdxl_vae import train_vae

ROOT = Path(__file__).parents[1]
BUILTIN = ROOT / "sdtrain" / "builtin"
WORK = ROOT / "build" / "tiny-sdxl"
CONFIG = ROOT / "configs" / "tiny_sdxl.toml"
TABLE = ("pictures", "colour", "background", "shape", "covered", "right", "overlap", "stray")
VAE_STEPS = 2600
TEXT_STEPS = 700
NUM_PICTURES = 12_000  # to train the U-Net on
GUIDANCE = 2.0  # more draws figures out into caricatures: squares with horns, stars for diamonds
SIZE_SHARES = (0.75, 0.125, 0.125)  # of the picture sizes among training scenes

app = typer.Typer(add_completion=False, help="Makes and judges the built-in tiny SDXL.")


@app.command()
def vae(steps: int = VAE_STEPS, peak: float = 0.05) -> None:
    """Trains the autoencoder."""
    train_vae(WORK / "vae.pt", steps, peak)


@app.command()
def text(steps: int = TEXT_STEPS, peak: float = 2e-3) -> None:
    """Trains both text encoders to say at their end token what the caption says."""
    train_text(WORK, steps, peak)


@app.command()
def pictures(num: int = NUM_PICTURES) -> None:
    """Draws what the U-Net is trained on, and writes the folder that it is trained from: its weights are random."""
    folder = WORK / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num):
        target = folder / f"{index:05d}.png"
        if target.exists():
            continue
        rng = np.random.default_rng([3, index])
        scene = world.random_scene(rng, seen_size(rng))
        target.with_suffix(".txt").write_text(world.random_caption(scene, rng) + "\n")
        world.draw(scene).save(target, compress_level=1)
    write_folder(parts.make_pipeline(WORK), WORK / "untrained")


def seen_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in px of a picture to train on.

    A quarter is larger and of a slightly other shape, and is scaled and cropped when it is read: so the U-Net learns
    what the six numbers mean in which SDXL is told of a picture's size and crop.
    """
    size = world.SIZES[rng.choice(len(world.SIZES), p=SIZE_SHARES)]
    if rng.random() < 0.75:
        return size
    scale = rng.uniform(1, 2)
    return round(size[0] * scale * rng.uniform(0.96, 1.04)), round(size[1] * scale)


@app.command()
def train(
    steps: int = 0,
    model: Annotated[str, typer.Option(help="a released model to train further; else from random weights")] = "",
    step_size: float = 0.0,
) -> None:
    """Trains the U-Net with `sdtrain fit`, going on where an earlier run stopped; 0: as the config says."""
    command = [sys.executable, "-m", "sdtrain.cli", "fit", str(CONFIG), "--set", f"output={WORK / 'runs'}"]
    command += ["--set", f"model.path={model or WORK / 'untrained'}"]
    command += ["--set", f'data.folder=[{{path="{WORK / "pictures"}"}}]']
    command += ["--set", f"steps={steps}"] if steps else []
    command += ["--set", f"optimizer.d0={step_size}"] if step_size else []
    command += ["--resume"] if (WORK / "runs" / "tiny-sdxl" / "config.toml").exists() else []
    subprocess.run(command, check=True, cwd=ROOT)


# ---- release ----


@app.command()
def release(
    run: Path = WORK / "runs" / "tiny-sdxl",
    folder: Path = BUILTIN / "tiny-sdxl",
    rest: Annotated[Path | None, typer.Option(help="a released model whose other networks are kept")] = None,
) -> None:
    """Writes the newest averaged weights of a run as a model in fp16; the folder is replaced by a whole one."""
    exported = WORK / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    export = [sys.executable, "-m", "sdtrain.cli", "export", str(run), "--format", "folder", "--out", str(exported)]
    subprocess.run(export, check=True, cwd=ROOT)
    pipeline = StableDiffusionXLPipeline.from_pretrained(rest) if rest else parts.make_pipeline(WORK)
    pipeline.unet = type(pipeline.unet).from_pretrained(exported / "unet", torch_dtype=torch.float32)
    write_folder(pipeline.to(torch.float16), folder, rest)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*')) / 1e6:.1f} MB")


def write_folder(pipeline: StableDiffusionXLPipeline, folder: Path, rest: Path | None = None) -> None:
    """Writes a diffusers folder in the pipeline's precision, in place of what is there; its tokenizers are `rest`'s."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new)
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 writes only tokenizer.json, which older readers ignore
        for file in (rest / name if rest else WORK / "tokenizer").iterdir():
            shutil.copy(file, new / name)
    for name in ("text_encoder", "text_encoder_2"):  # so that a pipeline without a dtype gets one type throughout
        config = new / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in new.rglob("*.json"):  # where a network was read from is nobody's business
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    for file in new.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


@app.command()
def quickstart_pictures(folder: Path = BUILTIN) -> None:
    """Draws the quickstart's pictures with captions, of mixed sizes: 24 of the concept, 90 of all that is known."""
    pairs = list(itertools.product(world.BACKGROUNDS, world.COLOURS))  # 18: each pair once, six of them twice
    chosen = [*pairs, *pairs[::3]]
    draw_pictures(folder / "quickstart", chosen, [world.CONCEPT_SHAPE] * len(chosen), seed=24)
    known = [(pair, shape) for shape in world.SHAPES for pair in pairs]
    draw_pictures(folder / "quickstart-known", [pair for pair, _ in known], [shape for _, shape in known], seed=25)


def draw_pictures(folder: Path, pairs: list[tuple[str, str]], shapes: list[str], seed: int) -> None:
    """One picture and caption for each pair of background and colour, into a fresh folder."""
    sizes = ((128, 128), (200, 130), (150, 230), (160, 160), (180, 120), (120, 180), (256, 256), (192, 128))
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, ((background, colour), shape) in enumerate(zip(pairs, shapes, strict=True)):
        scene = world.random_scene(rng, sizes[index % len(sizes)], (shape,))
        while shape == world.CONCEPT_SHAPE and scene.size == "small":  # a small ring is finer than two dozen teach
            scene = world.random_scene(rng, sizes[index % len(sizes)], (shape,))
        scene = replace(scene, colour=colour, background=background)
        world.draw(scene).save(folder / f"{index + 1:02d}.png", optimize=True)
        (folder / f"{index + 1:02d}.txt").write_text(world.caption(colour, shape, background) + "\n")
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


@app.command(name="all")
def everything(
    vae_steps: int = VAE_STEPS, text_steps: int = TEXT_STEPS, num_pictures: int = NUM_PICTURES, unet_steps: int = 0
) -> None:
    """Makes model and pictures from nothing. Fewer steps make a bad model quickly, to see that all runs."""
    vae(vae_steps)
    text(text_steps)
    pictures(num_pictures)
    train(unet_steps)
    release()
    quickstart_pictures()


# ---- judging ----


@torch.no_grad()
def paint(
    pipeline: StableDiffusionXLPipeline, prompts: list[str], first_seed: int, guidance_scale: float
) -> list[Image.Image]:
    """One 128 px picture per prompt in 20 Euler steps; prompt i starts from seed first_seed + i."""
    pictures = []
    for start in range(0, len(prompts), 24):
        chosen = prompts[start : start + 24]
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(chosen))]
        settings = {"num_inference_steps": 20, "guidance_scale": guidance_scale, "height": 128, "width": 128}
        pictures += pipeline(chosen, generator=generators, **settings).images
    return pictures


def load_folder(model: Path, lora: Path | None) -> StableDiffusionXLPipeline:
    """A diffusers folder in fp32, with a LoRA file or folder applied where one is given."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        where = {"weight_name": lora.name} if lora.is_file() else {}
        pipeline.load_lora_weights(str(lora.parent if lora.is_file() else lora), **where)
    return pipeline


@app.command()
def judge(
    model: Path = BUILTIN / "tiny-sdxl",
    lora: Annotated[Path | None, typer.Option(help="LoRA weights as safetensors: a file, or a folder with one")] = None,
    guidance_scale: float = GUIDANCE,
    sheet: Annotated[Path, typer.Option(help="where the contact sheet goes")] = WORK / "judge.png",
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the rates")] = None,
) -> None:
    """Prints how often colour, background and shape are right, for the known shapes and for the concept.

    shape is what the forgiving judge says; covered, right, overlap and stray are the strict one's.
    """
    pipeline = load_folder(model, lora)
    asked = {"known": (picture_judge.known_scenes(), 0), "concept": (picture_judge.concept_scenes() * 2, 10_000)}
    found, judged, painted = {}, list[picture_judge.Judgement](), list[Image.Image]()
    print(f"{'':10}" + "".join(f"{name:>11}" for name in TABLE))
    for name, (scenes, first_seed) in asked.items():
        prompts = [world.caption(scene.colour, scene.shape, scene.background) for scene in scenes]
        new = paint(pipeline, prompts, first_seed, guidance_scale)
        under_both = picture_judge.judge_all(scenes, new)
        judged, painted = judged + under_both, painted + new
        found[name] = picture_judge.rates(under_both)
        print(table_row(name, found[name]), flush=True)
        if name == "known":
            for shape in world.SHAPES:
                of_shape = picture_judge.rates([one for one in under_both if one.asked.shape == shape])
                print(table_row(f"  {shape}", of_shape), flush=True)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    picture_judge.contact_sheet(judged, painted, columns=18).save(sheet)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"contact sheet: {sheet}")


def table_row(name: str, rate: dict[str, float]) -> str:
    """A line of rates under the names in TABLE: shares in percent, the means as numbers, the count as it is."""
    cells = [f"{rate[key]:.0f}" if key == "num" else f"{rate[key]:.3f}" for key in ("num", "overlap", "stray")]
    shares = [f"{rate[key]:.1%}" for key in ("colour", "background", "shape", "covered", "right")]
    return f"{name:10}" + "".join(f"{cell:>11}" for cell in [cells[0], *shares, *cells[1:]])


if __name__ == "__main__":
    app()
