"""Header entries that models and adapters share; each is written and read in one way.

So adapters and checkpoints of one run say the same date, steps and resolution, and what one command writes another
reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from sdtrain.families.words import Resolution

CONFIG_KEY = "sdtrain.config"
"""The entry with the resolved config of the run, as TOML."""
STEPS_KEY = "ss_steps"
"""The entry with the number of optimizer steps, under the name that sd-scripts gave it and web interfaces show."""
OLD_STEPS_KEY = "sdtrain.step"
"""The entry in which older checkpoints have the number of steps; it is read, never written."""
RESOLUTION_KEY = "modelspec.resolution"


def now() -> str:
    """Return the time in UTC as the model specification wants it, ISO 8601: `2026-11-22T15:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def steps_entry(steps: int) -> dict[str, str]:
    """Return the entry for the optimizer steps behind a file's weights; empty where there were none."""
    return {STEPS_KEY: str(steps)} if steps else {}


def steps_of(metadata: Mapping[str, str]) -> int:
    """Return the number of optimizer steps behind a file's weights, 0 where the file does not say."""
    text = metadata.get(STEPS_KEY) or metadata.get(OLD_STEPS_KEY, "")
    return int(text) if re.fullmatch(r"\d{1,15}", text, re.ASCII) else 0


def resolution_entry(resolution_px: Resolution) -> dict[str, str]:
    """Return the entry for the size of the pictures that a file was trained on."""
    width, height = resolution_px
    return {RESOLUTION_KEY: f"{width}x{height}"}


def resolution_of(metadata: Mapping[str, str]) -> Resolution | None:
    """Return the size of the pictures that a file was trained on, None where the file does not say."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", metadata.get(RESOLUTION_KEY, ""), re.ASCII)
    return (int(found[1]), int(found[2])) if found else None
