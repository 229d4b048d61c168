"""Answers for programs: `--json` prints one object, from here alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from sdtrain.errors import UserError
from sdtrain.training.watching.text import say

ANSWER_VERSION = 1
"""Rises when a key of an answer changes its meaning or goes; new keys do not raise it."""


def answer(command: str, facts: Mapping[str, Any]) -> None:
    """Print what a command found as one JSON object in one line, with its version. What is no JSON is shown as text."""
    whole = _finite({"version": ANSWER_VERSION, "command": command, **facts})
    say(Console(), json.dumps(whole, default=str, ensure_ascii=True, allow_nan=False))


def refusal(error: UserError) -> dict[str, Any]:
    """Return what is wrong as part of an answer: every problem with its place, and the line of a TOML file or null."""
    problems = [{"where": one.where, "what": one.what, "line": one.line} for one in error.problems]
    return {"ok": False, "source": error.source, "problems": problems}


def wants_answer(words: Sequence[str]) -> bool:
    """Return whether a command line asks for an answer for programs."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options


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
