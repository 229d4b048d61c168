"""`sdtrain doctor`: looks at the machine and says what is wrong with it and what to do. Only here is torch imported."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sdtrain.commands.front.environment import told
from sdtrain.files.host import MEMINFO, memory_kib

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pydantic", "pillow", "numpy")
OLDEST_PYTHON = (3, 11)
ENOUGH_DISK_GIB = 10
"""A run's states and cache need about as much with an SDXL LoRA; a full fine-tune needs several times it."""
ENOUGH_RAM_GIB = 12
"""An SDXL checkpoint is read by way of the memory: 7 GB, and room beside it."""


@dataclass
class Findings:
    """What was looked at: facts by name, and what is wrong, each with what to do."""

    facts: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def examine(folder: Path) -> Findings:
    """Look at Python, libraries, devices, memory and the disk that `folder` lies on."""
    found = Findings()
    _python(found, sys.version_info[:2])
    _libraries(found, metadata.version)
    _devices(found, importlib.import_module)
    _memory(found, MEMINFO)
    _disk(found, folder, shutil.disk_usage)
    found.facts |= told(os.environ)
    return found


def _python(found: Findings, version: Sequence[int]) -> None:
    found.facts["python"] = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if tuple(version) < OLDEST_PYTHON:
        found.wrong.append(f"Python is older than {'.'.join(map(str, OLDEST_PYTHON))}; install a newer one")


def _libraries(found: Findings, version_of: Callable[[str], str]) -> None:
    for name in ("sdtrain", *LIBRARIES):
        try:
            found.facts[name] = version_of(name)
        except metadata.PackageNotFoundError:
            found.facts[name] = "is not installed"
            found.wrong.append(f"{name} is not installed in {sys.prefix}; run: {sys.executable} -m pip install {name}")


def _devices(found: Findings, load: Callable[[str], Any]) -> None:
    try:
        torch = load("torch")
    except (ImportError, OSError) as error:  # OSError: a shared library of its own is missing or of another machine
        found.facts["device"] = "unknown, for torch cannot be loaded"
        found.wrong.append(f"torch cannot be loaded: {error}; install it anew, see https://pytorch.org/get-started")
        return
    built_for = torch.version.cuda or torch.version.hip
    found.facts["torch built for"] = f"GPU runtime {built_for}" if built_for else "the CPU only"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            free, total = (number / 2**30 for number in torch.cuda.mem_get_info(index))
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
            bfloat16 = "bfloat16" if computes else "no bfloat16, so float16"
            found.facts[f"cuda:{index}"] = f"{card.name}, {free:.1f} of {total:.1f} GiB free, {bfloat16}"
        return
    from sdtrain.matmul import onednn_is_faster

    found.facts["device"] = "cpu"
    found.facts["float32 products"] = "by oneDNN" if onednn_is_faster() else "by PyTorch's own choice"
    if not built_for:
        found.wrong.append(
            "this torch is built for the CPU only, so that SDXL trains too slowly to be of use; with a GPU in the "
            "machine install another build, see https://pytorch.org/get-started"
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        found.wrong.append("CUDA_VISIBLE_DEVICES hides every card; unset it")
    else:
        found.wrong.append(
            f"torch finds no GPU, though it is built for one; if there is one, its driver is missing or older than "
            f"{built_for} needs: see what nvidia-smi or rocminfo says"
        )


def _memory(found: Findings, meminfo: Path) -> None:
    kib = memory_kib(meminfo)
    if kib is None:
        found.facts["memory"] = "unknown"
        return
    total, free = kib["MemTotal"] / 2**20, kib.get("MemAvailable", 0) / 2**20
    found.facts["memory"] = f"{free:.1f} of {total:.1f} GiB free"
    if free < ENOUGH_RAM_GIB:
        found.wrong.append(f"{free:.1f} GiB of memory are free; SDXL wants {ENOUGH_RAM_GIB}: end other programs")


def _disk(found: Findings, folder: Path, usage: Callable[[Path], Any]) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = usage(there).free / 2**30
    found.facts["disk"] = f"{free:.1f} GiB free at {there}"
    if free < ENOUGH_DISK_GIB:
        found.wrong.append(
            f"{free:.1f} GiB are free at {there}; a run wants {ENOUGH_DISK_GIB}: make room, or set `output` elsewhere"
        )
    if not os.access(there, os.W_OK):
        found.wrong.append(f"{there} cannot be written to; go to another folder, or set `output` elsewhere")
