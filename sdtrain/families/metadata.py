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
D_KEY = "sdtrain.d"
"""The entry with the step size d by network, as JSON, from which another run can start."""
TAGS_KEY = "ss_tag_frequency"
"""The entry with folder -> tag -> number of captions, as JSON."""
BUCKETS_KEY = "ss_bucket_info"
"""The entry with the sizes of pictures and how many there are of each, in sd-scripts' JSON."""
FOLDERS_KEY = "ss_dataset_dirs"
"""The entry with the folders of pictures and how often they are seen, in sd-scripts' JSON."""
STARTED_KEY = "ss_training_started_at"
"""The entry with the time at which the training began, in seconds since 1970, under sd-scripts' name."""
MERGED_KEY = "sdtrain.merged_from"
"""The entry with the files that a file was merged of, as JSON: name, hash, and weight."""
DATE_FORM = "%Y-%m-%dT%H:%M:%SZ"


def now() -> str:
    """Return the time in UTC as the model specification wants it, ISO 8601: `2026-11-22T15:00:00Z`."""
    return datetime.now(UTC).strftime(DATE_FORM)


def started_entry(date: str) -> dict[str, str]:
    """Return the entry for a time in the form of `now`; empty for what is none."""
    try:
        moment = datetime.strptime(date, DATE_FORM).replace(tzinfo=UTC)
    except ValueError:
        return {}
    return {STARTED_KEY: f"{moment.timestamp():.1f}"}


def started_of(metadata: Mapping[str, str]) -> str:
    """Return when the training behind a file began, in the form of `now`; empty where the file does not say."""
    text = metadata.get(STARTED_KEY, "")
    if not re.fullmatch(r"\d{1,11}(\.\d{1,9})?", text, re.ASCII):
        return ""
    return datetime.fromtimestamp(float(text), UTC).strftime(DATE_FORM)


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
