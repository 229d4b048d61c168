"""Measures what pictures cost: how long a step waits for its batch, and how long a start takes on many pictures.

    python scripts/bench_data.py waiting            a step's waiting time above the memory budget, with and without
                                                    reading ahead, on entries of SDXL's size at 1024 px
    python scripts/bench_data.py start --pictures 2000
                                                    check, cold and warm start beside plain Pillow, in CPU seconds

Encoders are stubs: only the code for data is measured. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain.config.schema import DataConfig
from sdtrain.data import cache as store
from sdtrain.data.batches import Batches, prepare_batches
from sdtrain.data.encoding import Encoders
from sdtrain.data.examples import scan_folders
from sdtrain.data.identity.digests import picture_digests
from sdtrain.files.remembered import RememberedDigests

NUM_ENTRIES, NUM_STEPS, COMPUTING_S = 64, 48, 0.05
PARTS = ("pillow", "check", "cold", "warm")


def quiet(what: str, done: int, total: int) -> None:
    """Show nothing."""


def make_pictures(folder: Path, num: int) -> None:
    """Write so many JPEGs of 160 x 120 px, all different, each with its own caption."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(num):
        coarse = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 120)).save(folder / f"{number:06d}.jpg")
        (folder / f"{number:06d}.txt").write_text(f"picture number {number}")


def stubs(latents: int, text: int) -> Encoders:
    """Return encoders that cost nothing. latents: pixels per latent. text: width of a caption's 77 states."""

    def captions(texts: list[str]) -> dict[str, Tensor]:
        states = torch.full((1, 77, text), float(len(texts[0])))
        return {"prompt_embeds": states, "pooled": states[:, 0]}

    def pixels(picture: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(picture, latents)[:, [0, 1, 2, 0]]

    return Encoders(pixels, captions, "vae", "text", lambda sizes: {"time_ids": sizes})


def prepared(folder: Path, cache: Path, resolution_px: int, encoders: Encoders) -> Batches:
    """Return the batches of a folder, as a run prepares them."""
    data = {"folder": [{"path": str(folder)}], "resolution_px": resolution_px, "batch_size": 2}
    config = DataConfig.model_validate(data | {"bucket_step_px": 64})
    examples, problems = scan_folders(config, decode=False)
    assert not problems, problems
    remembered = RememberedDigests(cache / "digests.json")
    digests = picture_digests([example.path for example in examples], remembered)
    remembered.keep()
    return prepare_batches(config, examples, encoders, cache=cache, seed=0, on_progress=quiet, digests=digests)


def forget(cache: Path) -> None:
    """Ask the system to drop the cached pages of all entries, so that they are read from the disk."""
    for path in cache.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def waits(batches: Batches, cache: Path) -> tuple[list[float], int]:
    """Return the seconds that each step waits for its batch, and how much the memory grew, in MiB.

    A step computes for as long as a small one on a GPU, asleep, as the CPU is then.
    """
    forget(cache)
    found, begun = [], 0
    for step in range(NUM_STEPS):
        started = time.perf_counter()
        for _batch, _share in batches.at(step):
            found.append(time.perf_counter() - started)
            time.sleep(COMPUTING_S)
            started = time.perf_counter()
        if step == NUM_STEPS // 4:
            begun = resident_mib()
    batches.close()
    return found, resident_mib() - begun


def resident_mib() -> int:
    """Return the memory of this process now, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def waiting() -> None:
    """Print the waiting time of a step, with reading ahead and without, alternating, from a cold page cache."""
    store.HELD_BYTES = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_pictures(root / "pictures", NUM_ENTRIES)
        encoders = stubs(8, 2048)
        prepared(root / "pictures", root / "cache", 1024, encoders)
        for _ in range(2):
            for name in ("in the step", "ahead"):
                batches = prepared(root / "pictures", root / "cache", 1024, encoders)
                if name == "in the step":
                    batches._ahead = None
                found, grown = waits(batches, root / "cache")
                median, mean, longest = (of(found[1:]) * 1e3 for of in (statistics.median, statistics.mean, max))
                print(
                    f"{name:12} waits {median:7.3f} ms (median), {mean:7.3f} (mean), {longest:7.3f} (longest after "
                    f"the first, {found[0] * 1e3:.3f} ms); memory {grown:+d} MiB from step {NUM_STEPS // 4} on",
                    flush=True,
                )


def plain_pillow(pictures: Path, cache: Path) -> None:
    """Decode every picture, the least that anybody must do."""

    def decode(path: Path) -> None:
        with Image.open(path) as image:
            image.convert("RGB")

    with ThreadPoolExecutor() as threads:
        list(threads.map(decode, sorted(pictures.glob("*.jpg"))))


def check(pictures: Path, cache: Path) -> None:
    """Read every pixel, as `sdtrain check` does."""
    scan_folders(DataConfig.model_validate({"folder": [{"path": str(pictures)}]}), decode=True)


def start(pictures: Path, cache: Path) -> None:
    """Prepare batches as `sdtrain fit` does."""
    prepared(pictures, cache, 128, stubs(8, 64))


def starts(num: int) -> None:
    """Print CPU seconds, wall seconds and peak memory of each part, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "pictures", num)
        time.sleep(3)  # files that changed just now are not remembered
        for part in PARTS:
            subprocess.run([sys.executable, __file__, "part", part, folder], check=True)


def run_part(part: str, folder: Path) -> None:
    """Run one part in this process and print what it cost beyond the imports."""
    functions: dict[str, Callable[[Path, Path], None]] = {"pillow": plain_pillow, "check": check}
    cpu, wall = time.process_time(), time.perf_counter()
    functions.get(part, start)(folder / "pictures", folder / "cache")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{part:7} {cpu:7.2f} s of CPU, {wall:7.2f} s, peak {peak} MiB", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["waiting", "start", "part"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--pictures", type=int, default=2000)
    arguments = parser.parse_args()
    match arguments.what:
        case "waiting":
            waiting()
        case "start":
            starts(arguments.pictures)
        case "part":
            run_part(arguments.rest[0], Path(arguments.rest[1]))


if __name__ == "__main__":
    main()
