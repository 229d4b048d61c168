"""Write the settings tables of README.md anew from the declarations in sdtrain/config/schema.py and beside it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdtrain.commands.front import environment
from sdtrain.commands.front.words import allowed_text, default_text
from sdtrain.config import schema
from sdtrain.config.settings import export, memory, objective, parallel
from sdtrain.families.readers import table_text

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- settings: written by scripts/update_readme.py -->", "<!-- end of settings -->"
VARIABLES_BEGIN = "<!-- environment: written by scripts/update_readme.py -->"
VARIABLES_END = "<!-- end of environment -->"
READERS_BEGIN, READERS_END = "<!-- readers: written by scripts/update_readme.py -->", "<!-- end of readers -->"
TABLES: list[tuple[str, type[BaseModel]]] = [
    ("", schema.Config),
    ("model", schema.ModelConfig),
    ("method", schema.LoraConfig),
    ("method", schema.FullConfig),
    ("data", schema.DataConfig),
    ("data.folder", schema.FolderConfig),
    ("optimizer", schema.OptimizerConfig),
    ("timesteps", objective.TimestepConfig),
    ("noise", objective.NoiseConfig),
    ("loss", objective.LossConfig),
    ("preserve", objective.PreserveConfig),
    ("preview", schema.PreviewConfig),
    ("checkpoint", schema.CheckpointConfig),
    ("validation", schema.ValidationConfig),
    ("validation.folder", schema.FolderConfig),
    ("export", export.ExportConfig),
    ("export.about", export.AboutConfig),
    ("memory", memory.MemoryConfig),
    ("parallel", parallel.ParallelConfig),
    ("tracking", schema.TrackingConfig),
]


def settings_text() -> str:
    """Return all tables as Markdown."""
    parts = []
    for name, model in TABLES:
        kind = ' with `kind = "lora"`' if model is schema.LoraConfig else ""
        kind = ' with `kind = "full"`' if model is schema.FullConfig else kind
        brackets = f"[[{name}]]" if name.endswith(".folder") else f"[{name}]"
        title = f"**`{brackets}`**{kind}" if name else "**At the top**"
        rows = [
            f"| `{key}` | {allowed_text(field)} | {_default(field)} | {field.description} |"
            for key, field in model.model_fields.items()
            if not _is_table(field.annotation) and not (key == "kind" and kind)
        ]
        parts.append("\n".join([title, "", "| setting | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _is_table(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, BaseModel)
    return any(_is_table(argument) for argument in get_args(annotation) if get_origin(annotation) is not Literal)


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{default_text(field)}`"


def with_settings(text: str) -> str:
    """Return the README's text with fresh tables: of settings, environment variables, and who reads which file."""
    text = _between(text, VARIABLES_BEGIN, VARIABLES_END, environment.table_text())
    text = _between(text, READERS_BEGIN, READERS_END, table_text())
    return _between(text, BEGIN, END, settings_text())


def _between(text: str, begin: str, end: str, new: str) -> str:
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n\n{new}\n\n{end}", text, flags=re.S)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    if BEGIN not in before:
        sys.exit(f"{README} has no place for the settings: {BEGIN}")
    README.write_text(with_settings(before), encoding="utf-8")
