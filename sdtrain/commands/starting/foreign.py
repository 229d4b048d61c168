"""The settings to draw with where a weights file, of another tool or merged here, has none in its header. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sdtrain.adapters.formats.describe import describe_file
from sdtrain.commands.starting.seen import opened_model, resolution_of
from sdtrain.errors import user_error
from sdtrain.families.known import FAMILIES


def foreign_table(path: Path, base: str) -> dict[str, Any]:
    """Return the settings of a run that could have written a file: of adapters on `base`, or of a whole model.

    base: of a whole model, where its configs and tokenizers are, which a single file lacks; may be empty. Raises
    UserError for adapters without a base model.
    """
    is_adapter = bool(describe_file(path).kind)
    if is_adapter and not base:
        what = f"is missing: {path.name} does not say which model it is for"
        raise user_error("sample", "--base", f"{what}; name a file, a folder, a hub id or builtin:NAME")
    model = {"path": base} if is_adapter else {"path": str(path), "components": base}
    opened = opened_model(base or str(path))
    return {
        "name": re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")[:100] or "sample",
        "steps": 1,
        "model": model,
        "method": {"kind": "lora" if is_adapter else "full"},
        "data": {
            "folder": [{"path": "."}],
            "resolution_px": resolution_of(opened) if opened else FAMILIES["sdxl"].resolution_px,
        },
    }
