"""Settings that people bring from other tools and that do not exist here, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from sdtrain.config.kohya.answers import Answers, needless
from sdtrain.config.kohya.known import KNOWN

_NO_SCHEDULE = KNOWN["lr_scheduler"].why
_NO_CLIPPING = KNOWN["max_grad_norm"].why
_NO_EMA = "an average of the weights is kept already (Schedule-Free), and is what every file holds; leave it out"

_OF_OTHERS: Answers = {
    **needless(_NO_SCHEDULE, "scheduler", "warmup", "warmup_steps", "warmup_ratio", "cosine_restarts"),
    **needless(_NO_CLIPPING, "grad_clip", "gradient_clipping", "clip_grad_norm"),
    **needless(_NO_EMA, "use_ema", "ema_decay"),
}

FOREIGN: Answers = {**_OF_OTHERS, **KNOWN}
"""What is answered to a setting by its name, in whatever section it stands."""

SECTIONS = ("general", "datasets", "subsets")
"""Tables of sd-scripts' dataset config. Those of its other configs may have any name."""


def nearest_foreign(key: str) -> str | None:
    """Return the setting of another tool whose name is nearly this one, None if there is none."""
    near = get_close_matches(key, FOREIGN, n=1, cutoff=0.85)
    return near[0] if near else None


def is_foreign_table(key: str, value: Any, ours: Collection[str]) -> bool:
    """Return whether a section that does not exist here is one of another tool, whose settings are answered singly.

    ours: the names of our own settings. A section that holds no others is one of ours with its name misspelt.
    """
    tables = value if isinstance(value, list) else [value]
    if not tables or not all(isinstance(table, Mapping) for table in tables):
        return False
    theirs = (inner for table in tables for inner in table if inner not in ours)
    return key in SECTIONS or any(inner in FOREIGN or inner in SECTIONS for inner in theirs)
