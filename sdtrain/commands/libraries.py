"""How the libraries below behave in a terminal."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Keep advice meant for programmers out of the user's terminal; errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
