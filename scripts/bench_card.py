"""Measures whole runs of a true-size SDXL on a CUDA card: seconds a step, peak, and a plain peer.

    python scripts/bench_card.py FOLDER --model-only          # write FOLDER/model.safetensors (6.9 GB, random weights)
    python scripts/bench_card.py FOLDER --plans               # what `sdtrain plan` says of every run; needs no card
    python scripts/bench_card.py FOLDER                       # every run of the table, then the plain loop

Runs go through `sdtrain fit` as a user's do: load, encode, train, a preview, a state and the weights. The peer is a
loop as the diffusers example writes it: peft's adapters beside a bfloat16 base under autocast, fused AdamW, latents and
captions encoded beforehand. Seconds are medians of the last steps of a run; a step's end waits for the card.
"""

from __future__ import annotations

import gc
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from prove_true_size import HEAD, write_model, write_tokenizers
from torch import Tensor

from sdtrain import StepRecord, UserError, fit, read_config

_PARTS = {
    "24 GB": "down_blocks.1.attentions.0 down_blocks.1.attentions.1 up_blocks.1.attentions.0 up_blocks.1.attentions.1 "
    "up_blocks.1.attentions.2",
    "12 GB": "down_blocks.1.attentions.0 down_blocks.1.attentions.1 down_blocks.2.attentions.0 "
    "down_blocks.2.attentions.1 mid_block.attentions.0 up_blocks.0.attentions.0 up_blocks.0.attentions.1 "
    "up_blocks.0.attentions.2 up_blocks.1.attentions.0 up_blocks.1.attentions.1 up_blocks.1.attentions.2",
}
"""What `sdtrain plan --fit-to` chose to recompute of a LoRA with four pictures."""
RUNS: dict[str, list[str]] = {
    "LoRA, batch 1": [],
    "LoRA, batch 1, single launches": ['memory.cuda_graphs="off"'],
    "LoRA, batch 4": ["data.batch_size=4"],
    "LoRA, batch 4, single launches": ["data.batch_size=4", 'memory.cuda_graphs="off"'],
    **{
        f"LoRA, batch 4, fit to {budget}": ["data.batch_size=4", f"memory.recompute={parts.split()!r}"]
        for budget, parts in _PARTS.items()
    },
    "LoRA, batch 4, recomputed": ["data.batch_size=4", "memory.gradient_checkpointing=true"],
    "LoRA, batch 1, int8 base": ['model.base_precision="int8"'],
    "LoRA, batch 1, fp8 base": ['model.base_precision="fp8"'],
    "LoRA, batch 1, nf4 base": ['model.base_precision="nf4"'],
    "full U-Net, fused backward": ["memory.fused_back_pass=true", "memory.gradient_checkpointing=true"],
    "full U-Net, mixed, fused backward": [
        'model.dtype="mixed"',
        "memory.fused_back_pass=true",
        "memory.gradient_checkpointing=true",
    ],
    "full U-Net, batch 4": ["data.batch_size=4"],
    "LoRA, batch 1, float16": ['model.dtype="float16"'],
    "LoRA and text encoders": ['method.train=["unet","text_encoder","text_encoder_2"]'],
    "LoRA and one text encoder": ['method.train=["unet","text_encoder"]'],
    "DoRA, batch 1": ['method.adapter="dora"'],
    "LoHa, batch 1": ['method.adapter="loha"'],
    "LoRA, batch 1, recomputed": ["memory.gradient_checkpointing=true"],
    "LoRA, batch 1, compiled": ["memory.compile=true"],
    "LoRA, batch 1, on 8 GB": ['memory.budget="8GB"'],
    "LoRA, batch 4, on 8 GB": ['memory.budget="8GB"', "data.batch_size=4"],
    "full U-Net, on 16 GB": ['memory.budget="16GB"'],
    "LoRA, batch 4, on 12 GB": ['memory.budget="12GB"', "data.batch_size=4"],
}
"""Where a name ends in the size of a card, PyTorch gets no more than such a card has for it."""
OF_DRIVER = 0.6
"""GiB of a card that its driver and CUDA's own memory take before PyTorch has any."""
CONFIG = (
    HEAD
    + """
[method]
{method}
[data]
resolution_px = 1024
batch_size = 1
[preview]
every = {steps}
prompts = ["a picture"]
seeds = [0]
num_inference_steps = 4
[export]
form = "native"
"""
)
LORA = 'kind = "lora"\nrank = 16\ntargets = "attention+ff"'
PEER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model and the runs are written.")],
    model_only: Annotated[bool, typer.Option(help="Write the model and leave.")] = False,
    plans: Annotated[bool, typer.Option(help="Print what `sdtrain plan` says of each run, and leave.")] = False,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 16,
    only: Annotated[str, typer.Option(help="Only these runs, separated by ;.")] = "",
    peer: Annotated[bool, typer.Option(help="Measure the plain loop as well.")] = True,
    profile: Annotated[str, typer.Option(help="Print where the time of two steps of this run goes.")] = "",
) -> None:
    """Measure."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.safetensors").exists():
        write_model(folder / "model.safetensors", torch.bfloat16)
        write_tokenizers(folder / "components")
        write_pictures(folder / "pictures")
    chosen = {name: settings for name, settings in RUNS.items() if not only or name in only.split(";")}
    if plans:
        for name, settings in chosen.items():
            print(planned(folder, name, settings, steps), flush=True)
    if model_only or plans:
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':<34}{'s/step':>8}{'first':>8}{'peak':>8}  GiB", flush=True)
    for name, settings in chosen.items():
        try:
            print(measure(folder, name, settings, steps, profiled=name == profile), flush=True)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if peer:
        print(plain_loop(folder, batch=1, steps=steps), flush=True)
        print(plain_loop(folder, batch=4, steps=steps), flush=True)


def write_pictures(folder: Path, num: int = 8) -> None:
    """Write smooth random pictures of 1024 px with captions."""
    folder.mkdir(parents=True)
    for index in range(num):
        small = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((1024, 1024), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a picture of number {index}")


def write_config(folder: Path, name: str, steps: int) -> Path:
    """Write the config of a run, but for its settings; return its path."""
    method = 'kind = "full"' if name.startswith("full") else LORA
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.toml"
    path.write_text(CONFIG.format(folder=folder, steps=steps, method=method))
    return path


def measure(folder: Path, name: str, settings: list[str], steps: int, *, profiled: bool) -> str:
    """Run `fit` once; return a row of the table."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    path = write_config(folder, name, steps)
    ends: list[float] = []
    trace = Trace(profiled, steps)

    def see(record: Any) -> None:
        if isinstance(record, StepRecord):
            ends.append(time.monotonic())
            trace.after(record.step)

    torch.cuda.reset_peak_memory_stats()
    set_card(name)
    began = time.monotonic()
    fit(path, overrides=settings, watchers=[see])
    peak = torch.cuda.max_memory_allocated() / 2**30
    seconds = [later - earlier for earlier, later in pairwise(ends)]
    median = statistics.median(seconds[len(seconds) // 2 : -1])
    row = f"{name:<34}{median:8.3f}{ends[0] - began:8.1f}{peak:8.2f}"
    return row + trace.table()


def set_card(name: str) -> None:
    """Let PyTorch have what a card of the size has that a run is named after; all where it names none."""
    total = torch.cuda.get_device_properties(0).total_memory
    size = re.search(r"on (\d+) GB$", name)
    share = (int(size[1]) - OF_DRIVER) * 2**30 / total if size else 1.0
    torch.cuda.set_per_process_memory_fraction(share)


class Trace:
    """Profiles two steps in the middle of a run, if asked."""

    def __init__(self, wanted: bool, steps: int) -> None:
        self._profile = torch.profiler.profile() if wanted else None
        self._first = steps // 2

    def after(self, step: int) -> None:
        """Begin and end between the steps that are profiled."""
        if self._profile is not None and step == self._first:
            self._profile.start()
        if self._profile is not None and step == self._first + 2:
            self._profile.stop()

    def table(self) -> str:
        """Return what the card and the host did most."""
        if self._profile is None:
            return ""
        found: Any = self._profile.key_averages()
        waits = sum(each.count for each in found if "Synchronize" in each.key)
        on_card = found.table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=60)
        on_host = found.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60)
        return f"\ntwo steps, {waits} waits for the card\n{on_card}\n{on_host}"


def planned(folder: Path, name: str, settings: list[str], steps: int) -> str:
    """Return what `sdtrain plan` says of a run, which needs no card."""
    path = write_config(folder, name, steps)
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "sdtrain", "plan", str(path), *options]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{name}\n{said.stdout}{said.stderr}"


def plain_loop(folder: Path, *, batch: int, steps: int) -> str:
    """Train by a plain loop; return a row of the table."""
    from peft import LoraConfig, inject_adapter_in_model

    from sdtrain.models.checkpoints.components import load_components
    from sdtrain.models.checkpoints.inspect import open_model

    config = read_config(write_config(folder, "LoRA", steps))
    torch.cuda.reset_peak_memory_stats()
    unet: Any = load_components(open_model(config.model, "model"), torch.bfloat16).networks["unet"]
    unet.requires_grad_(False).cuda()
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=PEER_TARGETS), unet)
    adapters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in adapters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    latents, text = torch.randn(batch, 4, 128, 128), torch.randn(batch, 77, 2048)
    added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.full((batch, 6), 1024.0)}
    ends = [time.monotonic()]
    for _ in range(steps):
        loss = plain_loss(unet, latents, text, added)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(loss.item())
        ends.append(time.monotonic())
    median = statistics.median(later - earlier for earlier, later in pairwise(ends[2:]))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return f"{f'plain peft loop, batch {batch}':<34}{median:8.3f}{ends[1] - ends[0]:8.1f}{peak:8.2f}"


def plain_loss(unet: Any, latents: Tensor, text: Tensor, added: dict[str, Tensor]) -> Tensor:
    """Return the loss () of a step as the diffusers example computes it."""
    there, noise = latents.cuda(), torch.randn_like(latents, device="cuda")
    timesteps = torch.randint(0, 1000, (len(latents),), device="cuda")
    conditions = {name: value.cuda() for name, value in added.items()}
    with torch.autocast("cuda", torch.bfloat16):
        found = unet(there + noise, timesteps, text.cuda(), added_cond_kwargs=conditions, return_dict=False)[0]
    return torch.nn.functional.mse_loss(found.float(), noise.float())


if __name__ == "__main__":
    typer.run(main)
