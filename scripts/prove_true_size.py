"""Proves on this machine that a true-size SDXL is written, loaded, trained and exported; prints times and peak memory.

    python scripts/prove_true_size.py FOLDER              writes FOLDER/model.safetensors (6.9 GB), loads and exports it
    python scripts/prove_true_size.py FOLDER --train      trains a few LoRA steps on it, too

The weights are random, of the published shapes: no picture is worth looking at, but every byte and every operation is
there. The file is deleted at the end unless --keep is given. About 14 GB of disk and 10 GB of memory are needed.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from sdtrain.config.schema import ModelConfig
from sdtrain.families.modelspec import Description, spec_metadata
from sdtrain.families.published_configs import CLIP_L_TEXT, OPEN_CLIP_G_TEXT, SCHEDULER, SDXL_UNET, SDXL_VAE
from sdtrain.families.sdxl import SDXL
from sdtrain.families.words import Component
from sdtrain.files.header import read_header
from sdtrain.files.locations import BUILTIN_FOLDER
from sdtrain.files.tensors import Planned, write_safetensors
from sdtrain.models.checkpoints.networks import empty_network
from sdtrain.models.checkpoints.single_file import Weight, original_tensors, write_single_file

CONFIGS = {
    "unet": SDXL_UNET,
    "vae": SDXL_VAE,
    "text_encoder": CLIP_L_TEXT,
    "text_encoder_2": OPEN_CLIP_G_TEXT,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
UNET_SIZE = (2_567_463_684, 1_680)
HEAD = """
name = "true-size"
output = "{folder}/runs"
steps = {steps}
[model]
path = "{folder}/model.safetensors"
components = "{folder}/components"
dtype = "bfloat16"
[[data.folder]]
path = "{folder}/pictures"
"""
TRAIN = (
    HEAD
    + """
[method]
kind = "lora"
rank = 8
targets = "attention"
[data]
resolution_px = 256
batch_size = 1
[preview]
every = 0
[memory]
gradient_checkpointing = true
"""
)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model is written.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    train: Annotated[bool, typer.Option(help="Train a few LoRA steps as well.")] = False,
    steps: Annotated[int, typer.Option(help="How many.")] = 3,
    keep: Annotated[bool, typer.Option(help="Leave the model there.")] = False,
    load_only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Write, load, and if asked train and export a true-size SDXL."""
    if load_only:
        load(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "model.safetensors").exists():  # one that was kept
            timed("written", lambda: write_model(folder / "model.safetensors", DTYPES[dtype]))
        write_tokenizers(folder / "components")
        # Another process, so that its peak is the loading's own.
        subprocess.run([sys.executable, __file__, str(folder), "--load-only"], check=True)
        if train:
            timed("trained and exported", lambda: train_lora(folder, steps))
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            print(f"peak memory of the largest process so far: {peak / 2**20:.2f} GiB")
    finally:
        if not keep:
            shutil.rmtree(folder)


def timed(what: str, call: Callable[[], None]) -> None:
    """Run something and print how long it took."""
    began = time.monotonic()
    call()
    print(f"{what} in {time.monotonic() - began:.1f} s", flush=True)


def write_model(path: Path, dtype: torch.dtype) -> None:
    """Write a single file in the original layout; one tensor is in memory at a time."""
    tensors: dict[str, Planned] = {}
    for component in SDXL.components:
        weights = random_weights(component, dtype)
        if component == "unet":
            size = (sum(math.prod(weight.shape) for weight in weights.values()), len(weights))
            assert size == UNET_SIZE, f"the U-Net has {size} parameters and tensors, not {UNET_SIZE}"
        tensors |= original_tensors(SDXL, component, weights, dtype)
    description = Description(title="random weights of SDXL's size", resolution_px=(1024, 1024))
    write_safetensors(path, tensors, {"format": "pt", **spec_metadata(description, SDXL, SCHEDULER)}, finite_only=True)
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB in {len(tensors)} tensors", flush=True)


def random_weights(component: Component, dtype: torch.dtype) -> dict[str, Weight]:
    """Return parameters that keep activations of about size one: uniform weights, norms of one, biases of zero."""
    generator = torch.Generator().manual_seed(0)

    def later(shape: tuple[int, ...], name: str) -> Weight:
        def value() -> Tensor:
            if len(shape) == 1:
                return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
            bound = 0.03 if "embedding" in name else 1 / math.sqrt(math.prod(shape[1:]))
            return torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)

        return Weight(shape, value)

    network = empty_network(SDXL, component, CONFIGS[component])
    return {name: later(tuple(tensor.shape), name) for name, tensor in network.named_parameters()}


def write_tokenizers(folder: Path) -> None:
    """Write the built-in tokenizers with as many words as CLIP's, most of which no caption has."""
    tiny = BUILTIN_FOLDER / "tiny-sdxl"
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        words = sorted(vocab := json.loads((tiny / name / "vocab.json").read_text()), key=lambda word: vocab[word])
        filler = [f"<{index}>" for index in range(CLIP_L_TEXT["vocab_size"] - len(words))]
        words = [*words[:-2], *filler, *words[-2:]]
        (folder / name / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        for other in ("merges.txt", "tokenizer_config.json"):
            shutil.copy(tiny / name / other, folder / name / other)


def load(folder: Path) -> None:
    """Check and load the model in bfloat16; prints times and the memory this process took at most."""
    from sdtrain.models.checkpoints.components import load_components
    from sdtrain.models.checkpoints.inspect import inspect_model, open_model

    config = ModelConfig(path=str(folder / "model.safetensors"), components=str(folder / "components"))
    began = time.monotonic()
    facts, problems = inspect_model(config)
    assert facts is not None and not problems, problems
    checked = time.monotonic()
    print(f"checked in {checked - began:.2f} s: {facts}", flush=True)
    for component in SDXL.components:  # imports are not what is measured here
        empty_network(SDXL, component, CONFIGS[component])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported = time.monotonic()
    components = load_components(open_model(config, "model"), torch.bfloat16)
    loaded = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    networks = [components.networks[component] for component in SDXL.components]
    num_bytes = sum(value.numel() * value.element_size() for network in networks for value in network.parameters())
    print(f"imports {imported - checked:.1f} s; loaded in {loaded - imported:.1f} s")
    print(f"the networks are {num_bytes / 2**30:.2f} GiB in memory (bfloat16, the VAE float32)")
    print(f"peak resident memory {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} GiB before the load", flush=True)
    again = folder / "again.safetensors"
    description = Description(title="the same again", resolution_px=(1024, 1024))
    timed("exported", lambda: print(write_single_file(components, again, description)))
    timed("compared", lambda: compare(folder / "model.safetensors", again))
    again.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory with the export {peak / 2**20:.2f} GiB", flush=True)


def compare(one: Path, other: Path) -> None:
    """Check that every tensor of the first file is in the second, byte for byte."""
    left, right = read_header(one), read_header(other)
    with one.open("rb") as first, other.open("rb") as second:
        for name, entry in left.entries.items():
            same = right.entries[name]
            assert (entry.dtype, entry.shape) == (same.dtype, same.shape), name
            first.seek(entry.start)
            second.seek(same.start)
            assert first.read(entry.end - entry.start) == second.read(same.end - same.start), name
    print(f"all {len(left.entries)} tensors are the same bytes; besides: {sorted(right.entries.keys() - left.entries)}")


def train_lora(folder: Path, steps: int) -> None:
    """Train a few steps through the command line, as a user would."""
    (folder / "pictures").mkdir(exist_ok=True)
    for name in ("01.png", "01.txt", "02.png", "02.txt"):
        shutil.copy(BUILTIN_FOLDER / "quickstart" / name, folder / "pictures")
    config = folder / "config.toml"
    config.write_text(TRAIN.format(folder=folder, steps=steps))
    subprocess.run(
        [sys.executable, "-m", "sdtrain.cli", "fit", str(config)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


if __name__ == "__main__":
    typer.run(main)
