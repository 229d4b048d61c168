"""Measures whole runs of `sdtrain fit`, and their steady steps, beside a plain loop as the diffusers example writes it.

    python scripts/bench_fit.py FOLDER                        # both models, three pairs each
    python scripts/bench_fit.py FOLDER --models tiny --pairs 5
    python scripts/bench_fit.py FOLDER --levers               # ours against ours with one lever moved

Each run is a process of its own, from its start to its file. The peer is written here: peft on the attention layers,
AdamW, a DataLoader; "plain" encodes pictures and captions at every step, "cached" once before. They take turns, and
what is printed are medians of the ratios of pairs, beside seconds and peaks, which depend on the machine. The models:
the built-in one, and its parts around a U-Net of 120 M random parameters.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from sdtrain.data.examples import BUILTIN_FOLDERS
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.training.watching.pace import MEMORY

SIDE_PX = 128
MID_UNET = {
    "block_out_channels": [128, 256, 384],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 4],
    "attention_head_dim": [8, 16, 24],
}


@dataclass(frozen=True)
class Setting:
    """A model with the length and the batch of its runs."""

    steps: int
    batch: int


SETTINGS = {"tiny": Setting(60, 8), "mid": Setting(20, 4)}
PEERS = ("plain", "cached")
LEVERS: dict[str, list[str]] = {
    "recomputed activations": ["memory.gradient_checkpointing=true"],
    "half a batch, twice": ["data.batch_size={half}", "data.gradient_accumulation=2"],
    "DoRA": ['method.adapter="dora"'],
    "LoHa": ['method.adapter="loha"'],
    "LoKr": ['method.adapter="lokr"'],
    "all layers": ['method.targets="all"'],
    "text encoders": ['method.train=["unet", "text_encoder", "text_encoder_2"]'],
    "a part recomputed": ['memory.recompute=["up_blocks.0.attentions.0"]'],
    "int8 base": ['model.base_precision="int8"'],
    "fp8 base": ['model.base_precision="fp8"'],
    "nf4 base": ['model.base_precision="nf4"'],
    "bfloat16": ['model.dtype="bfloat16"'],
    "compiled": ["memory.compile=true"],
}


@dataclass(frozen=True)
class Measured:
    """A run: seconds of all of it, to its first step and of a steady one, and the most memory of its process in MiB."""

    whole_s: float
    first_s: float
    step_s: float
    peak_mib: float


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where models and runs are written.")],
    models: Annotated[str, typer.Option(help="tiny, mid or both, separated by commas.")] = "tiny,mid",
    pairs: Annotated[int, typer.Option(help="How often each is run.")] = 3,
    levers: Annotated[bool, typer.Option(help="Compare ours with ours.")] = False,
    peer: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure, or be the peer of one run."""
    folder = folder.absolute()
    if peer:
        be_the_peer(folder, SETTINGS[models], cached=peer == "cached")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in models.split(","):
        place = prepare(folder / name, name)
        others = LEVERS if levers else {kind: [] for kind in PEERS}
        print(f"{name}: {SETTINGS[name].steps} steps of {SETTINGS[name].batch} pictures", flush=True)
        print(f"  {'':<24}{'whole':>8}{'first':>8}{'step':>8}{'peak':>8}   ours: whole, first, step, peak", flush=True)
        for other, settings in others.items():
            found = [compared(place, name, other, settings, turn) for turn in range(pairs)]
            print(row(other, found), flush=True)


def row(other: str, found: Sequence[tuple[Measured, Measured]]) -> str:
    """Return a row: the other's medians, and how many times as fast, and how large, ours is."""
    theirs = [median([pick(one[1]) for one in found]) for pick in (whole, first, step, peak)]
    ratios = [median([pick(one[1]) / pick(one[0]) for one in found]) for pick in (whole, first, step)]
    size = median([peak(one[0]) / peak(one[1]) for one in found])
    text = f"  {other:<24}{theirs[0]:7.1f}s{theirs[1]:7.1f}s{theirs[2]:7.3f}s{theirs[3]:5.0f}MiB"
    return f"{text}   {ratios[0]:.2f} x as fast, {ratios[1]:.2f} x, {ratios[2]:.2f} x, {size:.2f} x the memory"


def whole(one: Measured) -> float:
    """Return the seconds of all of a run."""
    return one.whole_s


def first(one: Measured) -> float:
    """Return the seconds from the start of a process to the end of its first step."""
    return one.first_s


def step(one: Measured) -> float:
    """Return the seconds of a steady step."""
    return one.step_s


def peak(one: Measured) -> float:
    """Return the most memory of a run."""
    return one.peak_mib


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def compared(place: Path, name: str, other: str, settings: list[str], turn: int) -> tuple[Measured, Measured]:
    """Run ours and another, in an order that changes from turn to turn; return both, ours first."""

    def ours() -> Measured:
        return run_ours(place, SETTINGS[name], [])

    def theirs() -> Measured:
        if other in PEERS:
            return run_peer(place, name, other)
        return run_ours(place, SETTINGS[name], [one.format(half=SETTINGS[name].batch // 2) for one in settings])

    if turn % 2:
        second = theirs()
        return ours(), second
    return ours(), theirs()


def run_ours(place: Path, setting: Setting, settings: Sequence[str]) -> Measured:
    """Run `sdtrain fit` from nothing, without previews."""
    for gone in ("runs", "cache"):
        shutil.rmtree(place / gone, ignore_errors=True)
    config = f"""
name = "ours"
output = "{place}/runs"
steps = {setting.steps}
[model]
path = "{model_path(place)}"
dtype = "float32"
[method]
kind = "lora"
targets = "attention"
[data]
resolution_px = {SIDE_PX}
batch_size = {setting.batch}
cache = "{place}/cache"
[[data.folder]]
path = "{place}/pictures"
[preview]
every = 0
[checkpoint]
every = 0
"""
    (place / "ours.toml").write_text(config)
    given = [word for one in settings for word in ("--set", one)]
    log = place / "runs" / "ours" / "log.jsonl"
    one = timed([sys.executable, "-m", "sdtrain", "fit", str(place / "ours.toml"), *given], log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    each = step_seconds([setting.batch / line["images_per_s"] for line in lines if line.get("images_per_s")])
    return replace(one, step_s=median(each[len(each) // 4 :]))


def step_seconds(means: Sequence[float]) -> list[float]:
    """Return the seconds of each step of which a log holds the running means, see `Pace`."""
    weights = list(accumulate(means, lambda weight, _: MEMORY * weight + 1, initial=0.0))
    sums = [0.0, *(mean * weight for mean, weight in zip(means, weights[1:], strict=True))]
    return [later - MEMORY * earlier for earlier, later in pairwise(sums)]


def run_peer(place: Path, name: str, kind: str) -> Measured:
    """Run the plain loop."""
    (place / "peer.log").unlink(missing_ok=True)
    one = timed([sys.executable, __file__, str(place), "--models", name, "--peer", kind], place / "peer.log")
    return replace(one, step_s=float((place / "peer.txt").read_text()))


def timed(command: Sequence[str], log: Path) -> Measured:
    """Run a process that writes to `log` after its first step; ours does so a step late, when the loss is there."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    first_s = time.perf_counter() - started
    if process.returncode is not None:
        raise typer.Exit(1)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise typer.Exit(1)
    return Measured(time.perf_counter() - started, first_s, math.nan, usage.ru_maxrss / 1024)


# ---- models and pictures ----


def model_path(place: Path) -> Path:
    """Return the folder of a model."""
    return BUILTIN_FOLDER / "tiny-sdxl" if place.name == "tiny" else place / "model"


def prepare(place: Path, name: str) -> Path:
    """Write the model and the pictures, unless they are there; return the folder."""
    if place.exists():
        return place
    place.mkdir()
    shutil.copytree(BUILTIN_FOLDERS["builtin:quickstart"], place / "pictures")
    if name == "mid":
        from diffusers import UNet2DConditionModel

        shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", place / "model")
        config = json.loads((place / "model" / "unet" / "config.json").read_text())
        shutil.rmtree(place / "model" / "unet")
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel.from_config({**config, **MID_UNET})
        unet.save_pretrained(place / "model" / "unet")
        print(f"  a U-Net of {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters")
    return place


# ---- the peer ----


class Pictures(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """Pictures of a folder with their captions, read at every use."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
        return tensor, path.with_suffix(".txt").read_text()


def be_the_peer(place: Path, setting: Setting, *, cached: bool) -> None:
    """Train a LoRA on the attention layers with AdamW, as the diffusers example does; write a step's median seconds."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    path = model_path(place)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
    vae: Any = AutoencoderKL.from_pretrained(path, subfolder="vae")
    encoder = TextEncoders(path)
    scheduler: Any = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    for network in (unet, vae):
        network.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    weights = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    pictures = Pictures(place / "pictures")

    @torch.no_grad()
    def encoded(pixels: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        return (latents, *encoder(captions))

    data: Any = (
        [
            tuple(row[0] for row in encoded(one[None], [text]))
            for one, text in map(pictures.__getitem__, range(len(pictures)))
        ]
        if cached
        else pictures
    )
    loader = torch.utils.data.DataLoader(data, batch_size=setting.batch, shuffle=True, drop_last=True)
    ends: list[float] = []
    while len(ends) < setting.steps:
        for batch in loader:
            latents, hidden, pooled = batch if cached else encoded(*batch)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
            sizes = torch.tensor([[SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX]] * len(latents))
            added = {"text_embeds": pooled, "time_ids": sizes}
            noisy = scheduler.add_noise(latents, noise, timesteps)
            prediction = unet(noisy, timesteps, hidden, added_cond_kwargs=added, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(prediction.float(), noise.float())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # for the progress bar
            ends.append(time.perf_counter())
            if len(ends) == 1:
                (place / "peer.log").write_text("1")
            if len(ends) == setting.steps:
                break
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "peer.safetensors")
    seconds = [later - earlier for earlier, later in pairwise(ends)]
    (place / "peer.txt").write_text(str(median(seconds[len(seconds) // 4 :])))


class TextEncoders:
    """Both text encoders of a model."""

    def __init__(self, path: Path) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        self.tokenizers: list[Any] = [CLIPTokenizer.from_pretrained(path / f"tokenizer{end}") for end in ("", "_2")]
        self.encoders: list[Any] = [
            CLIPTextModel.from_pretrained(path / "text_encoder"),
            CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2"),
        ]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the hidden states (n, 77, both widths) and the pooled output (n, width) of n captions."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output.text_embeds


if __name__ == "__main__":
    app()
