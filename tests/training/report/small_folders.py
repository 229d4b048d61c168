"""Run folders made by hand, with as many steps and pictures as a test wants: nothing is trained."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.config.read import resolve
from sdtrain.config.write import config_to_toml
from sdtrain.training.watching.grid import Compared, keep_base, labelled_grid, save_picture
from sdtrain.training.watching.log import log_line, note_line, validation_line
from sdtrain.training.watching.records import GroupRecord, NoteRecord, StepRecord, ValidationRecord

SCRIPT = "<script>alert(1)</script>"


def noise(side_px: int, number: int) -> Image.Image:
    """A picture that no format makes small."""
    size = 3 * side_px * side_px
    return Image.frombytes("RGB", (side_px, side_px), os.urandom(size)).rotate(number)


def run_folder(
    folder: Path,
    table: dict[str, Any],
    *,
    steps: int = 60,
    previews: int = 3,
    prompts: tuple[str, ...] = (SCRIPT,),
    side_px: int = 32,
    drawn: int = 14,
) -> Path:
    """A run with a log, validations, notes and previews; of the previews `drawn` differ, the others are the same files.

    table: the settings. prompts: its rows of previews, with two seeds each.
    """
    preview = {**table["preview"], "prompts": list(prompts), "seeds": [0, 1], "every": max(1, steps // previews)}
    config = resolve({**table, "steps": steps, "preview": preview}, "test config")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config_to_toml(config), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        groups = tuple(
            GroupRecord(name, d * min(step, 30), 9e-5, 1.1e-5 / step, step > 40, 1e-6)
            for name, d in (("unet", 1e-6), ("text_encoder", 2.5e-6))
        )
        loss = math.nan if step == 5 else 0.1 + 0.1 / step + 0.01 * math.sin(step)
        lines.append(log_line(StepRecord(step, loss, 4, 3.0 + step / 7, groups, step == 5, (), 1.5)))
        if step % 20 == 0:
            lines.append(validation_line(ValidationRecord(step, 0.2 - step / 1000, 0.0123, 8, step, 0.1)))
    lines.append(note_line(NoteRecord(steps, f"note: nothing but {SCRIPT} & \"quotes\" 'too'")))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo', encoding="utf-8")
    rows = [[noise(side_px, 0) for _ in range(2)] for _ in prompts]
    keep_base(rows, folder / "previews" / "base.png", {"prompts": list(prompts), "seeds": [0, 1]})
    files: list[Path] = []
    for index in range(previews):
        path = folder / "previews" / f"step-{index * (steps // previews):06d}.png"
        if index < drawn:
            grid = [[noise(side_px, index) for _ in range(2)] for _ in prompts]
            save_picture(labelled_grid(grid, prompts, [0, 1], "a", Compared(rows, "base", "now")), path)
            files.append(path)
        else:
            os.link(files[index % drawn], path)
    return folder
