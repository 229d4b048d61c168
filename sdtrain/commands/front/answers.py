"""Answers for programs: `--json` prints one object, from here alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sdtrain.training.watching.text import say

ANSWER_VERSION = 1
"""Rises when a key of an answer changes its meaning or goes; new keys do not raise it."""


def answer(command: str, facts: Mapping[str, Any]) -> None:
    """Print what a command found as one JSON object in one line, with its version. What is no JSON is shown as text."""
    whole = _finite({"version": ANSWER_VERSION, "command": command, **facts})
    say(Console(), json.dumps(whole, default=str, ensure_ascii=True, allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a value whose numbers all exist in JSON: one that is not finite is null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value
