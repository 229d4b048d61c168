"""One run: where it writes, where it computes and how it draws random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator

from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import user_error
from sdtrain.files.writer import write_text
from sdtrain.training.ranks.group import ALONE, Ranks
from sdtrain.training.start import run_folder


@dataclass(frozen=True)
class Run:
    """The folder that a run writes to, its settings, the device and precision of its networks, and its processes."""

    folder: Path
    config: Config
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = ALONE

    def generator(self, stream: str, *indices: int) -> Generator:
        """Return a CPU generator that depends on (seed, stream, indices) alone, never on what was drawn before."""
        return generator_of(self.config.seed, stream, *indices)

    @property
    def weights_path(self) -> Path:
        """The file with averaged weights that a finished run leaves."""
        return self.folder / "weights" / f"{self.config.name}.safetensors"

    @property
    def best_weights_path(self) -> Path:
        """The file with the averaged weights of the step whose held-out loss was lowest."""
        return self.folder / "weights" / f"{self.config.name}-best.safetensors"


def generator_of(seed: int, stream: str, *indices: int) -> Generator:
    """Return a CPU generator for one draw, seeded by a hash of (seed, stream, indices)."""
    text = "/".join([str(seed), stream, *map(str, indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def pick_device(config: Config, local_rank: int = 0) -> torch.device:
    """Return the device that a config means; of several processes on a machine, each gets its own.

    Raises UserError when it asks for a GPU that is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise user_error("this machine", "device", "cuda was asked for, but torch finds no GPU; use `auto` or `cpu`")
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, local_rank) if kind == "cuda" and local_rank else torch.device(kind)


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Return the precision of the networks: what the config says, or bfloat16 on a GPU that has it, else float32."""
    match config.model.dtype:
        case "float32" | "mixed":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
            return torch.bfloat16 if fast else torch.float32


def open_run(config: Config, ranks: Ranks = ALONE) -> Run:
    """Return the run of a config; nothing is written. Raises UserError when it asks for a GPU that is not there."""
    device = pick_device(config, ranks.place.local_rank)
    return Run(run_folder(config.output, config.name), config, device, pick_dtype(config, device), ranks)


def write_resolved_config(run: Run) -> None:
    """Make the run's folder and write the resolved config into it, before anything else is written there."""
    if not run.ranks.is_first:
        return
    write_text(run.folder / "config.toml", config_to_toml(run.config))
