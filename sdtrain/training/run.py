"""One run: where it writes, where it computes and how it draws random numbers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from sdtrain.config.schema import Config, FullConfig
from sdtrain.config.write import config_to_toml
from sdtrain.errors import user_error
from sdtrain.files.writer import write_text
from sdtrain.matmul import onednn_is_faster
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
    """Return the precision of the networks: what the config says, or what suits the device.

    Raises UserError where the config asks for bfloat16, and the device's bfloat16 would be slow arithmetic in software.
    """
    word = config.model.dtype
    if word in ("bfloat16", "mixed") and lacks_bfloat16(device):
        what = f'{word}, but this card does not compute in bfloat16; use "float16" or "auto"'
        raise user_error("this machine", "model.dtype", what)
    match word:
        case "float32" | "mixed":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return _held_for_float16(config)
        case "auto":
            if lacks_bfloat16(device):
                return _held_for_float16(config)
            return torch.bfloat16 if device.type == "cuda" else torch.float32


def _held_for_float16(config: Config) -> torch.dtype:
    """Return the precision of networks that compute in float16, which is too coarse for weights that are trained."""
    return torch.float32 if isinstance(config.method, FullConfig) else torch.float16


def lacks_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a GPU without arithmetic in bfloat16; PyTorch would make up for it in software."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """Return the type in which networks compute that are held in float32; None where all compute in their own."""
    if config.model.dtype == "mixed":
        return torch.bfloat16
    return torch.float16 if isinstance(config.method, FullConfig) and computes_in_float16(config, device) else None


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the block in which networks compute that are held in float32 for what is trained, where there are any."""
    dtype = autocast_dtype(config, device)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def computes_in_float16(config: Config, device: torch.device) -> bool:
    """Return whether a run computes in float16, for which its loss is scaled."""
    return config.model.dtype == "float16" or chose_float16(config, device)


def chose_float16(config: Config, device: torch.device) -> bool:
    """Return whether `auto` means float16, for want of bfloat16."""
    return config.model.dtype == "auto" and lacks_bfloat16(device)


def notes_on(config: Config, device: torch.device) -> list[str]:
    """Return what a person should know of how a run computes on a device."""
    notes = []
    if chose_float16(config, device):
        notes.append("this card does not compute in bfloat16, so the run computes in float16, with a scaled loss")
    if config.memory.compile and device.type == "cpu" and onednn_is_faster():
        notes.append("compiled steps are slower than others on this processor: leave memory.compile out, or use a GPU")
    return notes


def open_run(config: Config, ranks: Ranks = ALONE) -> Run:
    """Return the run of a config; nothing is written. Raises UserError when it asks for a GPU that is not there."""
    device = pick_device(config, ranks.place.local_rank)
    return Run(run_folder(config.output, config.name), config, device, pick_dtype(config, device), ranks)


@contextmanager
def repeatable(config: Config, device: torch.device) -> Iterator[None]:
    """With `deterministic`, compute the block on a GPU with kernels that give the same bits every time.

    The settings are PyTorch's own, of the whole process, and are as they were afterwards. cuBLAS reads its own when it
    is first used, so this is entered before.
    """
    if not config.deterministic or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels: Any = torch.utils.deterministic
    filled = kernels.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    kernels.fill_uninitialized_memory = False  # which would only cost time: nothing reads what was not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        kernels.fill_uninitialized_memory = filled


def write_resolved_config(run: Run) -> None:
    """Make the run's folder and write the resolved config into it, before anything else is written there."""
    if not run.ranks.is_first:
        return
    write_text(run.folder / "config.toml", config_to_toml(run.config))
