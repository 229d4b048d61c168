"""What files say of themselves in entries that models and adapters share: each is written and read in one way.

Adapters and checkpoints of one run then say the same date, steps and resolution, and what one command writes another
reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from sdtrain.families.words import Resolution

CONFIG_KEY = "sdtrain.config"
"""The resolved config of the run, as TOML."""
STEPS_KEY = "ss_steps"
"""Optimizer steps; the name that sd-scripts gave it and that web interfaces show."""
OLD_STEPS_KEY = "sdtrain.step"
"""Where checkpoints said it before; read, never written."""
RESOLUTION_KEY = "modelspec.resolution"


def now() -> str:
    """The time in UTC as the model specification wants it, ISO 8601: `2026-11-22T15:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def steps_entry(steps: int) -> dict[str, str]:
    """The entry for the steps behind a file's weights; none when there were none."""
    return {STEPS_KEY: str(steps)} if steps else {}


def steps_of(metadata: Mapping[str, str]) -> int:
    """The steps behind a file's weights, 0 when it does not say."""
    said = metadata.get(STEPS_KEY) or metadata.get(OLD_STEPS_KEY, "")
    return int(said) if re.fullmatch(r"\d{1,15}", said, re.ASCII) else 0


def resolution_entry(resolution_px: Resolution) -> dict[str, str]:
    """The entry for the size of the pictures a file was trained on."""
    width, height = resolution_px
    return {RESOLUTION_KEY: f"{width}x{height}"}


def resolution_of(metadata: Mapping[str, str]) -> Resolution | None:
    """The size of the pictures a file was trained on, None when it does not say."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", metadata.get(RESOLUTION_KEY, ""), re.ASCII)
    return (int(found[1]), int(found[2])) if found else None
