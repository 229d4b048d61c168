"""Trains and judges the built-in model `tiny-sdxl`, an SDXL in miniature that paints the picture world.

    python scripts/make_tiny_sdxl.py all               everything from nothing into sdtrain/builtin/
    python scripts/make_tiny_sdxl.py judge             how often colour, background and shape are right
    python scripts/make_tiny_sdxl.py judge --lora F    the same with a LoRA, and how often the concept is

`all` runs vae, text, train, release and quickstart-pictures in this order. vae and train keep their state in
build/tiny-sdxl and go on from there when they are started again. On two cores of a 2.5 GHz Xeon shared with other work
it took about 70 minutes: decoder 10, text encoders 3, scenes 3, U-Net 45 for 5,250 steps.

Three choices make so little time enough. The encoder is set by hand to scale a picture down, so latents are small
pictures from the first minute and only the decoder learns. The text encoders are trained alone: from their outputs
linear heads read the colour, shape and background a caption names and the letters of unknown words; frozen afterwards,
their outputs are computed once per caption. With v-prediction and zero terminal SNR flat colours come right at once.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import picture_world as world
import tiny_sdxl_parts as parts
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

BUILTIN = Path(__file__).parents[1] / "sdtrain" / "builtin"
WORK = Path(__file__).parents[1] / "build" / "tiny-sdxl"
GUIDANCE = 3.0  # with zero terminal SNR more makes colours harsh
SIZE_SHARES = (0.75, 0.125, 0.125)  # of the picture sizes among training scenes
LETTERS = "abcdefghijklmnopqrstuvwxyz"

app = typer.Typer(add_completion=False, help="Makes and judges the built-in tiny SDXL.")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One clipped optimizer step at learning rate `lr`, on gradients averaged over the workers."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if dist.is_initialized():
        gradients = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(gradients)
        gradients /= dist.get_world_size()
        for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(gradient.view_as(parameter))
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def report(name: str, step: int, steps: int, losses: list[float], began: float) -> None:
    """One progress line with the mean of the last fifty losses."""
    mean, seconds = np.mean(losses[-50:]), time.monotonic() - began
    print(f"{name} {step}/{steps} loss {mean:.4f} {seconds:.0f} s", flush=True)


# ---- pictures and autoencoder ----


def any_picture(rng: np.random.Generator) -> Image.Image:
    """A picture for the autoencoder: world scenes with the concept, and polygons of any form in any two colours."""
    size = world.SIZES[0]
    if rng.random() < 0.5:
        return world.draw(world.random_scene(rng, size, (*world.SHAPES, world.CONCEPT_SHAPE)))
    num = int(rng.integers(3, 12))
    angles = np.sort(rng.uniform(0, 2 * math.pi, num))
    reach = rng.uniform(15, 60, (num, 1))
    corners = reach * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.uniform(40, 88, 2)
    named = [*world.COLOURS.values(), *world.BACKGROUNDS.values()]
    colours = [named[rng.integers(len(named))] if rng.random() < 0.5 else rng.integers(0, 256, 3) for _ in range(2)]
    return world.draw_polygon(corners, *(tuple(int(c) for c in colour) for colour in colours), size)


def to_tensor(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as float [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode_pictures(model: AutoencoderKL, pictures: list[Image.Image]) -> Tensor:
    """Latents of pictures of one size, float [B, 4, H / 8, W / 8], not yet scaled."""
    return model.encode(to_tensor(pictures)).latent_dist.mode()


def decoder_loss(
    model: AutoencoderKL, pool: list[Image.Image], latents: Tensor, rng: np.random.Generator, generator: torch.Generator
) -> Tensor:
    """Error of eight rebuilt crops of 64 px: a quarter of a picture costs a quarter."""
    chosen, (y, x) = rng.integers(0, len(pool), 8), (int(n) for n in rng.integers(0, 9, 2))
    small = latents[torch.from_numpy(chosen), :, y : y + 8, x : x + 8]
    noise = torch.randn(small.shape, generator=generator)
    strength = 0.1 * torch.rand(8, 1, 1, 1, generator=generator)  # the U-Net's latents will not be perfect either
    rebuilt = model.decode(small + strength * noise).sample
    pixels = to_tensor([pool[i].crop((x * 8, y * 8, x * 8 + 64, y * 8 + 64)) for i in chosen])
    return F.l1_loss(rebuilt, pixels) + 2 * F.mse_loss(rebuilt, pixels)


@app.command()
def vae(steps: int = 2000, peak: float = 2e-3) -> None:
    """Trains the decoder to sharpen what the encoder, which stays a plain downscaler, leaves of a picture.

    Latents that cannot change let the U-Net train beside the decoder instead of after it.
    """
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    pool = [any_picture(rng) for _ in range(3000)]
    torch.manual_seed(1)  # for the initial weights
    model, state = parts.make_vae().to(memory_format=torch.channels_last).eval(), {"step": 0}
    parts.start_as_downscaler(model)
    if saved := parts.read_state(WORK / "vae.pt"):
        state = saved
        model.load_state_dict(saved["model"])
    latents = torch.cat([encode_pictures(model, pool[i : i + 50]) for i in range(0, len(pool), 50)])
    state |= {"scaling_factor": 1 / float(latents[:, :3].std()), "model": model.state_dict()}
    parts.write_state(WORK / "vae.pt", state)
    parameters = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    began, losses = time.monotonic(), []
    for step in range(state["step"], steps):
        loss = decoder_loss(model, pool, latents, rng, generator)
        update(optimizer, loss, learning_rate(step, steps, peak))
        losses.append(loss.item())
        if step % 50 == 49:
            report("vae", step + 1, steps, losses, began)
            parts.write_state(WORK / "vae.pt", {**state, "step": step + 1})


# ---- text encoders ----


class Readers(nn.Module):
    """Linear heads that read a caption's meaning; needed for training only."""

    def __init__(self) -> None:
        super().__init__()
        # Read where SDXL reads: both penultimate layers, and the second encoder's pooled output.
        kinds = [*world_words(), LETTERS]
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, len(kind) + (kind is not LETTERS)) for kind in kinds)
            for width in (*parts.WIDTHS, parts.WIDTHS[1])
        )

    def forward(self, states: list[Tensor], labels: Tensor, letters: Tensor) -> Tensor:
        """Summed loss; labels int [B, 3] with the number of words for "not said", letters float [B, 26]."""
        loss = torch.zeros(())
        for state, heads in zip(states, self.heads, strict=True):
            *named, spelled = heads
            loss = loss + sum(F.cross_entropy(head(state), labels[:, i]) for i, head in enumerate(named))
            loss = loss + F.binary_cross_entropy_with_logits(spelled(state), letters)
        return loss


def world_words() -> list[list[str]]:
    """The words for colours, shapes and backgrounds."""
    return [list(world.COLOURS), list(world.SHAPES), list(world.BACKGROUNDS)]


def read_caption(text: str) -> tuple[list[int], list[float]]:
    """What a caption says (the number of words of a kind for "not said"), and the letters of its unknown words."""
    words = text.replace(",", " ").split()
    labels = [next((kind.index(w) for w in words if w in kind), len(kind)) for kind in world_words()]
    known = {w for kind in world_words() for w in kind} | set(" ".join(t for t, _ in world.TEMPLATES).split()) | {"an"}
    unknown = "".join(w for w in words if w not in known)
    return labels, [float(letter in unknown) for letter in LETTERS]


@app.command()
def text(steps: int = 700, peak: float = 2e-3) -> None:
    """Trains both text encoders to say at their end token what the caption says."""
    rng = np.random.default_rng(2)
    pipeline = parts.make_pipeline(WORK)
    torch.manual_seed(2)  # for the heads' initial weights
    encoders, readers = (pipeline.text_encoder, pipeline.text_encoder_2), Readers()
    parameters = [p for module in (*encoders, readers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.99))
    began, losses = time.monotonic(), []
    for step in range(steps):
        captions = [world.random_caption(world.random_scene(rng), rng) for _ in range(64)]
        ids = pipeline.tokenizer(captions, padding=True, return_tensors="pt").input_ids
        end = (ids == pipeline.tokenizer.eos_token_id).int().argmax(1)
        first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
        rows = torch.arange(len(ids))
        states = [first.hidden_states[-2][rows, end], second.hidden_states[-2][rows, end], second.text_embeds]
        labels, letters = zip(*map(read_caption, captions), strict=True)
        loss = readers(states, torch.tensor(labels), torch.tensor(letters))
        update(optimizer, loss, learning_rate(step, steps, peak))
        losses.append(loss.item())
        if step % 50 == 49:
            report("text", step + 1, steps, losses, began)
    parts.write_state(
        WORK / "text.pt", {f"text_encoder{s}": e.state_dict() for s, e in zip(("", "_2"), encoders, strict=True)}
    )


# ---- U-Net ----


def seen_scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[world.Scene, Image.Image, list[float]]:
    """A scene, its picture, and SDXL's six numbers: original height and width, crop top and left, height and width."""
    scene = world.random_scene(rng, size)
    (width, height), left, top = size, 0, 0
    picture = world.draw(scene)
    if rng.random() < 0.2:  # cut the picture out of one a little larger, at a corner the numbers tell
        picture = picture.resize((width + 12, height + 12), Image.Resampling.LANCZOS)
        left, top = (int(n) for n in rng.integers(0, 13, 2))
        picture = picture.crop((left, top, left + width, top + height))
    original = rng.uniform(1, 4) if rng.random() < 0.3 else 1.0
    return scene, picture, [round(height * original), round(width * original), top, left, height, width]


@torch.no_grad()
def encode_captions(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [B, 77, C] and pooled embeddings [B, C2], as the SDXL pipeline computes them."""
    states = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, dim=-1), output.text_embeds


@torch.no_grad()
def cache_scenes(pipeline: StableDiffusionXLPipeline, size: tuple[int, int], num: int) -> dict[str, Tensor]:
    """`num` encoded scenes of one size: latents, prompt_embeds, pooled, time_ids."""
    rng = np.random.default_rng([3, *size])
    columns: dict[str, list[Tensor]] = {"latents": [], "prompt_embeds": [], "pooled": [], "time_ids": []}
    for _ in range(0, num, 50):
        scenes, pictures, numbers = zip(*(seen_scene(rng, size) for _ in range(50)), strict=True)
        latents = encode_pictures(pipeline.vae, list(pictures))
        embeds, pooled = encode_captions(pipeline, [world.random_caption(scene, rng) for scene in scenes])
        # Half precision halves the file; the released model stores its weights no finer either.
        values = (latents * pipeline.vae.config.scaling_factor, embeds.half(), pooled, torch.tensor(numbers))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return {name: torch.cat(column) for name, column in columns.items()}


def cached_pool(pipeline: StableDiffusionXLPipeline, num: int) -> list[dict[str, Tensor]]:
    """Encoded scenes of every size, three quarters of them square; made once and kept in the work folder."""
    path = WORK / "pool.pt"
    if (state := parts.read_state(path)) is None:
        sizes = zip(world.SIZES, SIZE_SHARES, strict=True)
        state = {"pool": [cache_scenes(pipeline, size, int(num * share)) for size, share in sizes]}
        parts.write_state(path, state)
    return state["pool"]


def unet_loss(unet: nn.Module, scenes: dict[str, Tensor], alphas: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity; a tenth of the captions are dropped (zeros, as SDXL does)."""
    latents = scenes["latents"]
    num = len(latents)
    kept = torch.rand(num, generator=generator) > 0.1
    # One timestep from each of `num` parts of the schedule, so that every batch sees all noise levels; the root makes
    # the noisy end denser, where a figure's shape is decided.
    places = (torch.randperm(num, generator=generator) + torch.rand(num, generator=generator)) / num
    timesteps = (places.sqrt() * len(alphas)).long().clamp(max=len(alphas) - 1)
    signal = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    noise = torch.randn(latents.shape, generator=generator)
    added = {"text_embeds": scenes["pooled"] * kept[:, None], "time_ids": scenes["time_ids"]}
    embeds = scenes["prompt_embeds"].float() * kept[:, None, None]
    predicted = unet(signal * latents + sigma * noise, timesteps, embeds, added_cond_kwargs=added).sample
    return F.mse_loss(predicted, signal * noise - sigma * latents)


def draw_batch(pool: list[dict[str, Tensor]], draw: int, batch: int) -> dict[str, Tensor]:
    """The scenes of a draw, all of one size; a function of the draw's number alone."""
    rng = np.random.default_rng([4, draw])
    scenes = pool[rng.choice(3, p=SIZE_SHARES)]
    chosen = torch.from_numpy(rng.integers(0, len(scenes["latents"]), batch))
    return {name: column[chosen] for name, column in scenes.items()}


@app.command()
def train(steps: int = 5250, peak: float = 1.5e-3, batch: int = 16, num_scenes: int = 6400, workers: int = 2) -> None:
    """Trains the U-Net on cached latents, keeping a running average of its weights for the release.

    Layers this small gain little from threads: one worker per core, each with its share of the batch, is faster.
    """
    pool = cached_pool(parts.make_pipeline(WORK), num_scenes)
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (workers, f"{meeting}/workers", steps, peak, batch // workers, pool)
        torch.multiprocessing.spawn(train_worker, arguments, nprocs=workers)


def train_worker(
    rank: int, workers: int, meeting: str, steps: int, peak: float, batch: int, pool: list[dict[str, Tensor]]
) -> None:
    """One of several equal trainers; the first one reports and saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    torch.manual_seed(0)  # for the initial weights, the same in all workers
    unet, alphas = parts.make_unet().train(), parts.make_scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    average, first = {name: p.detach().clone() for name, p in unet.named_parameters()}, 0
    if state := parts.read_state(WORK / "unet.pt"):
        average, first = state["average"], state["step"]
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    began, losses = time.monotonic(), []
    for step in range(first, steps):
        draw = step * workers + rank
        loss = unet_loss(unet, draw_batch(pool, draw, batch), alphas, torch.Generator().manual_seed(draw))
        update(optimizer, loss, learning_rate(step, steps, peak))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()), list(unet.parameters()), 1 - min(0.998, (step + 1) / (step + 10))
            )
        losses.append(loss.item())
        if rank == 0 and step % 50 == 49:
            report("unet", step + 1, steps, losses, began)
        if rank == 0 and (step % 250 == 249 or step + 1 == steps):
            state = {"model": unet.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            parts.write_state(WORK / "unet.pt", {**state, "step": step + 1})


# ---- release ----


@app.command()
def release(folder: Path = BUILTIN / "tiny-sdxl") -> None:
    """Writes the model in fp16 as a diffusers folder; the folder is replaced only once the new one is whole."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    parts.make_pipeline(WORK).to(torch.float16).save_pretrained(new)
    for name in ("tokenizer", "tokenizer_2"):  # transformers 5 writes only tokenizer.json, which older readers ignore
        for file in (WORK / "tokenizer").iterdir():
            shutil.copy(file, new / name)
    for name in ("text_encoder", "text_encoder_2"):  # so that a pipeline without a dtype gets one type throughout
        config = new / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for file in new.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.rglob('*')) / 1e6:.1f} MB")


@app.command()
def quickstart_pictures(folder: Path = BUILTIN) -> None:
    """Draws the quickstart's pictures with captions, of mixed sizes: 24 of the concept, 24 of known shapes."""
    pairs = list(itertools.product(world.BACKGROUNDS, world.COLOURS))  # 18: each pair once, six of them twice
    chosen = [*pairs, *pairs[::3]]
    draw_pictures(folder / "quickstart", chosen, [world.CONCEPT_SHAPE] * len(chosen), seed=24)
    draw_pictures(folder / "quickstart-known", chosen, [world.SHAPES[i % 4] for i in range(len(chosen))], seed=25)


def draw_pictures(folder: Path, pairs: list[tuple[str, str]], shapes: list[str], seed: int) -> None:
    """One picture and caption for each pair of background and colour, into a fresh folder."""
    sizes = ((128, 128), (200, 130), (150, 230), (160, 160), (180, 120), (120, 180), (256, 256), (192, 128))
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, ((background, colour), shape) in enumerate(zip(pairs, shapes, strict=True)):
        drawn = world.random_scene(rng, sizes[index % len(sizes)], (shape,))
        scene = replace(drawn, colour=colour, background=background)
        world.draw(scene).save(folder / f"{index + 1:02d}.png", optimize=True)
        (folder / f"{index + 1:02d}.txt").write_text(world.caption(colour, shape, background) + "\n")
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


@app.command(name="all")
def everything() -> None:
    """Makes model and pictures from nothing."""
    vae()
    text()
    train()
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
    """Prints how often colour, shape and background are right, for the known shapes and for the concept."""
    pipeline = load_folder(model, lora)
    parts = {"known": (world.known_scenes(), 0), "concept": (world.concept_scenes() * 2, 10_000)}
    found, pictures, asked = {}, [], []
    print(f"{'':10}{'pictures':>9}{'colour':>9}{'background':>12}{'shape':>8}")
    for name, (scenes, first_seed) in parts.items():
        prompts = [world.caption(scene.colour, scene.shape, scene.background) for scene in scenes]
        painted = paint(pipeline, prompts, first_seed, guidance_scale)
        found[name] = rate = world.rates(scenes, painted)
        asked, pictures = asked + scenes, pictures + painted
        row = f"{name:10}{rate['num']:9.0f}{rate['colour']:9.1%}{rate['background']:12.1%}{rate['shape']:8.1%}"
        print(row, flush=True)
    sheet.parent.mkdir(parents=True, exist_ok=True)
    world.contact_sheet(asked, pictures, columns=18).save(sheet)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"contact sheet: {sheet}")


if __name__ == "__main__":
    app()
