"""Measures report.html: how large it is and how long it takes to write, by the number of previews.

    python scripts/bench_report.py --previews 10 100 1000

A run's folder is made by hand, with ten steps of log for each preview, and previews of noise, which no format makes
small; nothing is trained. `first` is a page written from the files alone, `again` the next one of the same process, as
a run writes it: thumbnails are kept. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.training.watching.grid import Compared, keep_base, labelled_grid, save_picture
from sdtrain.training.watching.log import log_line
from sdtrain.training.watching.records import GroupRecord, StepRecord
from sdtrain.training.watching.report.page import write_page
from sdtrain.training.watching.report.pictures import Shelf

PROMPTS = ("a red zorbit on a white background", "a blue zorbit on a black background")
SEEDS = (0, 1)
STEPS_BETWEEN = 10


def noise(side_px: int, number: int) -> Image.Image:
    """Return a picture of noise that the number alone decides."""
    pixels = np.random.default_rng(number).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_run(folder: Path, previews: int, side_px: int) -> None:
    """Write the config, the log and the previews of a run."""
    steps = previews * STEPS_BETWEEN
    table = {
        "name": folder.name,
        "output": str(folder.parent),
        "steps": steps,
        "model": {"path": "builtin:tiny-sdxl"},
        "method": {"kind": "lora"},
        "data": {"folder": [{"path": "builtin:quickstart"}]},
        "preview": {"every": STEPS_BETWEEN, "prompts": list(PROMPTS), "seeds": list(SEEDS)},
    }
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config_to_toml(resolve(table, "bench")), encoding="utf-8")
    group = GroupRecord("unet", 1e-4, 9e-5, 1e-5, False, 1e-6)
    with (folder / "log.jsonl").open("w", encoding="utf-8") as log:
        for step in range(1, 1 + steps):
            log.write(log_line(StepRecord(step, 0.1 + 0.1 / step, 4, 3.0, (group,), False, (), 1.5)) + "\n")
    base = [[noise(side_px, 0) for _ in SEEDS] for _ in PROMPTS]
    keep_base(base, folder / "previews" / "base.png", {"prompts": list(PROMPTS), "seeds": list(SEEDS)})
    for index in range(previews):
        rows = [[noise(side_px, 1 + index) for _ in SEEDS] for _ in PROMPTS]
        grid = labelled_grid(rows, PROMPTS, SEEDS, f"step {index}", Compared(base, "base", "now"))
        save_picture(grid, folder / "previews" / f"step-{index * STEPS_BETWEEN:06d}.png")


def measure(previews: int, side_px: int) -> str:
    """Return size and times of the page of a run with so many previews, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(run, previews, side_px)
        shelf, taken = Shelf(), []
        for _ in range(2):
            started = time.perf_counter()
            page = write_page(run, "finished", shelf)
            taken.append(time.perf_counter() - started)
        size = page.stat().st_size / 1e6
    return f"{previews:5d} previews: {size:.2f} MB, first {taken[0]:.2f} s, again {taken[1]:.2f} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--previews", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--side", type=int, default=256, help="pixels of each picture's side")
    chosen = parser.parse_args(arguments)
    for previews in chosen.previews:
        print(measure(previews, chosen.side), flush=True)


if __name__ == "__main__":
    main()
