"""Answers for programs: `--json` prints one object, from here alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sdtrain.training.watching.text import say

ANSWER_VERSION = 1
"""Rises when a key of an answer changes its meaning or goes; new keys do not raise it."""


def answer(command: str, facts: Mapping[str, Any]) -> None:
    """Print what a command found as one JSON object in one line, with its version. What is no JSON is shown as text."""
    text = json.dumps({"version": ANSWER_VERSION, "command": command, **facts}, default=str, ensure_ascii=True)
    say(Console(), text)
