"""The fine-tunes that `bench_defaults.py` measures: what is trained, on which pictures, and what is held out.

Everything is drawn by `picture_world` from fixed seeds, at 128 px, and encoded once per process. A task is the same for
all who are measured on it: batches, noise and timesteps are functions of (seed, step) as in `sdtrain fit`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import picture_judge
import picture_world as world
import torch
from bench_folded import FoldedUNet, live_adapters
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sdtrain
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config
from sdtrain.data.batches import Batch
from sdtrain.data.order import Order, Piece, dropped
from sdtrain.diffusion.loss import error_per_image
from sdtrain.diffusion.prediction import training_target
from sdtrain.families.words import DENOISER
from sdtrain.models.model import Model, SamplingSettings
from sdtrain.models.sampling import sample
from sdtrain.training.computing.objective import Objective
from sdtrain.training.optimizers import build_optimizer
from sdtrain.training.parameters import Trainable, train_parameters
from sdtrain.training.prepare import open_and_load
from sdtrain.training.run import generator_of, open_run
from sdtrain.training.start import trains_text
from sdtrain.training.watching.preview import to_picture

RELEASED = "builtin:tiny-sdxl"
BUILTIN = Path(sdtrain.__file__).parent / "builtin" / "tiny-sdxl"
TAUGHT_STEPS = 4000
TAUGHT = Path(__file__).resolve().parents[1] / "build" / "bench-defaults" / f"epsilon-{TAUGHT_STEPS}"
"""The built-in model, which predicts v under zero terminal SNR, after it was taught to predict the noise."""
SIDE_PX = 128
BATCH_SIZE = 4
CAPTION_DROPOUT = 0.1  # as in the quickstart
STRATA = 4
"""Held-out pictures are each looked at once in every quarter of the noise schedule."""
HELD_OUT_SEED = 1000
GUIDANCE = 2.0
PICTURES_AT_ONCE = 24


@dataclass(frozen=True)
class Task:
    """A fine-tune of the built-in model.

    method: the config's section of that name. Of `shapes` in `finish` there are `num` pictures, each seen `repeats`
    times an epoch, beside `num_known` plain ones of what the model knows. rolled: whether the palette is another one,
    every picture's red, green and blue changing places. model: the path of what is trained.
    """

    title: str
    method: dict[str, Any]
    shapes: tuple[str, ...]
    num: int
    repeats: int = 1
    num_known: int = 0
    finish: str = "plain"
    rolled: bool = False
    model: str = RELEASED


NETWORKS = ["unet", "text_encoder", "text_encoder_2"]
TASKS = {
    "concept": Task(
        "a new shape, LoRA on all layers, known shapes beside it as in the quickstart",
        {"kind": "lora", "targets": "all"},
        (world.CONCEPT_SHAPE,),
        num=24,
        repeats=5,
        num_known=90,
    ),
    "style": Task(
        "outlines on all known shapes, LoRA on attention and feed-forward",
        {"kind": "lora", "targets": "attention+ff"},
        world.SHAPES,
        num=36,
        finish="outlined",
    ),
    "concept-text": Task(
        "a new shape, LoRA on attention and feed-forward of the U-Net and both text encoders",
        {"kind": "lora", "targets": "attention+ff", "train": NETWORKS},
        (world.CONCEPT_SHAPE,),
        num=24,
        repeats=5,
        num_known=90,
    ),
    "full-shift": Task(
        "all known shapes in another palette, full fine-tune",
        {"kind": "full"},
        world.SHAPES,
        num=90,
        rolled=True,
    ),
}
MEASURED = tuple(TASKS)
"""The tasks that are run unless others are named."""
TASKS |= {f"{name}-epsilon": replace(TASKS[name], model=str(TAUGHT)) for name in ("concept", "style")}
TASKS["base-epsilon"] = Task(
    "what the built-in model knows, to teach it another prediction", {"kind": "full"}, world.SHAPES, num=720,
    model=str(TAUGHT),
)  # fmt: skip

Part = Literal["new", "known"]


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures: latents (n, c, h, w), captions, how often each is seen, and what is new about which."""

    latents: Tensor
    captions: tuple[str, ...]
    repeats: tuple[int, ...]
    parts: tuple[Part, ...]

    def at(self, numbers: Sequence[int]) -> Tensor:
        """Return the latents of some pictures."""
        return self.latents[list(numbers)]


def config_of(task: Task, steps: int, seed: int, settings: Sequence[str] = ()) -> Config:
    """Return the config of a run of the task. settings: further `key=value`, as `--set` takes them."""
    table = {
        "name": "bench",
        "steps": steps,
        "seed": seed,
        "device": "cpu",
        "model": {"path": task.model, "dtype": "float32"},
        "method": task.method,
        "data": {"folder": [{"path": "builtin:quickstart"}], "batch_size": BATCH_SIZE},  # none of it is read
    }
    return resolve(table, "bench_defaults", settings)


def sizes_of(num: int) -> dict[str, Tensor]:
    """Return what the model is told of the sizes of n pictures that nothing was cropped from."""
    return {"time_ids": torch.tensor([[SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX]] * num, dtype=torch.float32)}


# ---- pictures ----


def draw(task: Task, seed: int, *, num: int, num_known: int) -> tuple[list[Image.Image], Pictures]:
    """Return a task's pictures, and their captions with latents still missing."""
    rng = np.random.default_rng([7, seed])
    pictures, captions = [], []
    for index in range(num + num_known):
        shapes, finish = (task.shapes, task.finish) if index < num else (world.SHAPES, "plain")
        scene = world.random_scene(rng, (SIDE_PX, SIDE_PX), (shapes[index % len(shapes)],), (finish,))
        colours, grounds = list(world.COLOURS), list(world.BACKGROUNDS)  # each pair about equally often
        scene = replace(scene, colour=colours[index % 6], background=grounds[index // 6 % 3])
        pictures.append(roll(world.draw(scene), 1) if task.rolled else world.draw(scene))
        captions.append(world.caption(scene.colour, scene.shape, scene.background))
    repeats = (task.repeats,) * num + (1,) * num_known
    new, known = cast(list[Part], ["new"]), cast(list[Part], ["known"])
    parts = tuple(new * num + known * num_known)
    return pictures, Pictures(torch.empty(0), tuple(captions), repeats, parts)


def roll(picture: Image.Image, places: int) -> Image.Image:
    """Return a picture with red, green and blue moved on by some places; what is grey stays as it is."""
    return Image.fromarray(np.roll(np.asarray(picture), places, axis=2))


def encode(model: Model, drawn: tuple[list[Image.Image], Pictures]) -> Pictures:
    """Return pictures with their latents."""
    pictures, rest = drawn
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    return replace(
        rest, latents=torch.cat([model.encode_pixels(some) for some in torch.split(pixels, PICTURES_AT_ONCE)])
    )


# ---- what is shared by all runs of a process ----


@functools.cache
def base_model(path: str = RELEASED) -> Model:
    """Return the built-in model as it was released, or as it was taught; runs train copies of it."""
    if path == str(TAUGHT) and not TAUGHT.exists():
        teach("base-epsilon")
    task = replace(TASKS["concept"], model=path)
    return open_and_load(open_run(config_of(task, 1, 0)))


def teach(name: str) -> None:
    """Write a model whose U-Net is the averaged one of a full fine-tune of the built-in one on a task."""
    unfinished = TAUGHT.with_suffix(".part")
    shutil.copytree(BUILTIN, unfinished, dirs_exist_ok=True)
    schedule = unfinished / "scheduler" / "scheduler_config.json"
    said = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | said))
    config = config_of(TASKS[name], TAUGHT_STEPS, 0, [f"model.path={unfinished}", "optimizer.d_coef=1.0"])
    model: Any = open_and_load(open_run(config))
    trainable = train_parameters(model, open_run(config))
    optimizer, feed = build_optimizer(trainable, config), Feed(name, config)
    objective = Objective(model, config, torch.device("cpu"))
    for step in range(config.steps):
        backward(objective, feed, config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    optimizer.eval()
    [file] = (unfinished / "unet").glob("*.safetensors")
    save_file({key: value.detach().contiguous() for key, value in model.unet.state_dict().items()}, file)
    unfinished.rename(TAUGHT)


@functools.cache
def training_pictures(name: str, seed: int) -> Pictures:
    """Return the pictures that a run of a task with this seed trains on."""
    task = TASKS[name]
    return encode(base_model(), draw(task, seed, num=task.num, num_known=task.num_known))


@functools.cache
def held_out_pictures(name: str) -> Pictures:
    """Return a task's held-out pictures, new and known ones in about the shares in which they are trained."""
    task = TASKS[name]
    known = 10 if task.num_known else 0
    return encode(base_model(), draw(task, HELD_OUT_SEED, num=24 - known, num_known=known))


@functools.cache
def encoded_captions(captions: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the conditioning of captions by the text encoders as they were released."""
    with torch.no_grad():
        return base_model().encode_captions(captions)


# ---- a run's own model ----


def trainable_copy(config: Config) -> tuple[Model, Trainable]:
    """Return a copy of the model, ready to be trained as the config says, and its parameters."""
    model: Any = copy.deepcopy(base_model(config.model.path))
    plain = copy.deepcopy(model.unet)
    trainable = train_parameters(model, open_run(config))
    if config.method.kind == "lora" and DENOISER in config.method.train:
        parameters = {group.name: group.parameters for group in trainable.groups}[DENOISER]
        model.unet = FoldedUNet(plain, live_adapters(model.networks[DENOISER], parameters))
    return model, trainable


# ---- batches and measures ----


class Feed:
    """The batches of a run: a function of (seed, step), whoever trains."""

    def __init__(self, name: str, config: Config) -> None:
        self._pictures = training_pictures(name, config.seed)
        self._encodes = trains_text(config)
        num = len(self._pictures.captions)
        self._order = Order(
            [(SIDE_PX, SIDE_PX)] * num, self._pictures.repeats, batch_size=BATCH_SIZE, accumulation=1, seed=config.seed
        )
        self._seed = config.seed

    def at(self, step: int) -> Batch:
        """Return the batch of a step."""
        numbers = self._order.step(step)[0]
        empty = dropped(self._seed, step, 0, len(numbers), CAPTION_DROPOUT)
        all_captions = self._pictures.captions
        captions = tuple(
            "" if is_empty else all_captions[number] for number, is_empty in zip(numbers, empty, strict=True)
        )
        text = None
        if not self._encodes:  # the empty caption stands behind all others
            rows = [-1 if is_empty else number for number, is_empty in zip(numbers, empty, strict=True)]
            text = {key: value[rows] for key, value in encoded_captions((*all_captions, "")).items()}
        plan = (Piece(0, 0, len(numbers), len(numbers)),)
        return Batch(0, plan, self._pictures.at(numbers), captions, text, sizes_of(len(numbers)), ())


def backward(objective: Objective, feed: Feed, config: Config, step: int) -> None:
    """Leave the gradients of a step, counted from 0, in what is trained."""
    loss = objective(feed.at(step), functools.partial(generator_of, config.seed, "noise", step))
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def held_out_losses(model: Model, name: str, *, encodes: bool) -> dict[str, float]:
    """Return the mean loss on the held-out pictures, with always the same noise and timesteps: of `all`, and by part.

    encodes: whether captions are encoded by the model's own text encoders, because these are trained.
    """
    pictures = held_out_pictures(name)
    num = len(pictures.captions)
    text = model.encode_captions(pictures.captions) if encodes else encoded_captions(pictures.captions)
    losses = torch.zeros(num)
    quarter = model.schedule.num_timesteps // STRATA
    for stratum in range(STRATA):
        noise = torch.randn(pictures.latents.shape, generator=generator_of(0, "held out", stratum))
        timesteps = torch.tensor([stratum * quarter + (97 * i + 31 * stratum) % quarter for i in range(num)])
        noisy = model.schedule.add_noise(pictures.latents, noise, timesteps)
        target = training_target(model.prediction, model.schedule, pictures.latents, noise, timesteps)
        losses += error_per_image(model.predict(noisy, timesteps, {**text, **sizes_of(num)}), target, kind="l2")
    losses /= STRATA
    parts = {part: losses[[one == part for one in pictures.parts]] for part in ("new", "known")}
    return {"all": float(losses.mean()), **{part: float(some.mean()) for part, some in parts.items() if len(some)}}


@functools.cache
def untouched_loss(name: str) -> float:
    """Return the held-out loss of the model as it was released."""
    return held_out_losses(base_model(TASKS[name].model), name, encodes=False)["all"]


def painted_rates(model: Model, name: str) -> dict[str, float]:
    """Return how often the judges see what was asked for, of what is new and of what is known.

    new: everything right to the strict judge, and in the style that was taught. covered, known_covered: the forgiving
    half of it, the shape alone.
    """
    task = TASKS[name]
    third = [scene for index, scene in enumerate(picture_judge.known_scenes()) if (index + index // 6) % 3 == 0]
    new = picture_judge.concept_scenes() if world.CONCEPT_SHAPE in task.shapes else third
    known = third if task.num_known else []
    pictures = paint(model, [*new, *known])
    if task.rolled:
        pictures = [roll(picture, -1) for picture in pictures]
    judged = picture_judge.judge_all([*new, *known], pictures)
    styled = [task.finish == "plain" or picture_judge.finish(picture) == task.finish for picture in pictures]
    num = len(new)
    found = {
        "new": float(np.mean([one.is_right and style for one, style in zip(judged[:num], styled, strict=False)])),
        "covered": picture_judge.rates(judged[:num])["covered"],
    }
    if known:
        rates = picture_judge.rates(judged[num:])
        found |= {"known": rates["right"], "known_covered": rates["covered"]}
    return found


@torch.no_grad()
def paint(model: Model, scenes: list[world.Scene]) -> list[Image.Image]:
    """Return a picture of each scene's caption, drawn in 20 Euler steps, scene i from seed i."""
    settings = SamplingSettings(20, GUIDANCE, SIDE_PX, SIDE_PX)
    pictures = []
    for start in range(0, len(scenes), PICTURES_AT_ONCE):
        some = scenes[start : start + PICTURES_AT_ONCE]
        asked = model.encode_captions([world.caption(one.colour, one.shape, one.background) for one in some])
        nothing = model.encode_captions([""] * len(some))
        generators = [generator_of(start + index, "judge") for index in range(len(some))]
        pictures += [to_picture(one) for one in sample(model, asked, nothing, generators, settings)]
    return pictures


def unet_hash() -> str:
    """Return the first digits of a digest of the built-in model's U-Net, which every result depends on."""
    [file] = (BUILTIN / "unet").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
