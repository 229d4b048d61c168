"""What the values of settings may be, and how every section of them behaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]


def _usable_path(text: str) -> str:
    """Return a path as it is. Raises ValueError for one that no file system takes."""
    if "\0" in text:
        raise ValueError("a path without zero bytes")
    if any(len(name.encode("utf-8", "surrogateescape")) > LONGEST_NAME for name in text.split("/")):
        raise ValueError(f"a path whose names have at most {LONGEST_NAME} bytes each")
    if len(text) > LONGEST_PATH:
        raise ValueError(f"a path of at most {LONGEST_PATH} characters")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a path; there is no user of that name, whose home ~ could mean") from None
    return text


def _whole_if_whole(number: float) -> float:
    """Return 3 for 3.0, so that it is shown as it is written."""
    return int(number) if number == int(number) else number


Times = Annotated[
    float, Field(ge=0.001, le=100_000), AfterValidator(_whole_if_whole), PlainSerializer(lambda number: number)
]
PathText = Annotated[str, AfterValidator(_usable_path)]
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""What file systems take, in bytes for a name and nearly so for a path."""


def memory_bytes(text: str) -> int:
    """Return the bytes that a size such as `8GB` means, 0 for what is none; as cards are sold, a GB is 2^30 bytes."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,3})?)\s*(GB|GiB|MB|MiB)\s*", text, re.IGNORECASE)
    return int(float(match[1]) * 2 ** (30 if match[2][0] in "gG" else 20)) if match else 0


def _budget(text: str) -> str:
    """Return a budget as it is. Raises ValueError for what is none."""
    if text not in ("off", "auto") and not memory_bytes(text):
        raise ValueError("off, auto, or the size of a memory such as 8GB")
    return text


Budget = Annotated[str, AfterValidator(_budget)]


class Settings(BaseModel):
    """The behaviour of every section: it is frozen and strict about keys, and numbers are not read out of strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
