"""Write the settings tables of README.md anew from the declarations in sdtrain/config/schema.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sdtrain.config import schema
from sdtrain.config.write import toml_value
from sdtrain.families.readers import table_text

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- settings: written by scripts/update_readme.py -->", "<!-- end of settings -->"
READERS_BEGIN, READERS_END = "<!-- readers: written by scripts/update_readme.py -->", "<!-- end of readers -->"
LARGEST = 1_000_000_000
TABLES: list[tuple[str, type[BaseModel]]] = [
    ("", schema.Config),
    ("model", schema.ModelConfig),
    ("method", schema.LoraConfig),
    ("method", schema.FullConfig),
    ("data", schema.DataConfig),
    ("data.folder", schema.FolderConfig),
    ("optimizer", schema.OptimizerConfig),
    ("timesteps", schema.TimestepConfig),
    ("noise", schema.NoiseConfig),
    ("loss", schema.LossConfig),
    ("preview", schema.PreviewConfig),
    ("checkpoint", schema.CheckpointConfig),
    ("validation", schema.ValidationConfig),
    ("validation.folder", schema.FolderConfig),
    ("export", schema.ExportConfig),
    ("memory", schema.MemoryConfig),
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
            f"| `{key}` | {_type(field)} | {_default(field)} | {field.description} |"
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
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "`{}`" if value == {} else f"`{toml_value(value)}`"


def _type(field: FieldInfo) -> str:
    return _named(field.annotation, field.metadata)


def _named(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _named(arguments[0], arguments[1].metadata if isinstance(arguments[1], FieldInfo) else arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        joint = ", " if all(get_origin(argument) is Literal for argument in arguments) else " or "
        return joint.join(_named(argument) for argument in arguments)
    if origin is list:
        return f"list of {_named(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return f"table of {'pattern' if arguments[0] is str else 'network'} = {_named(arguments[1])}"
    word = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}[annotation]
    return word + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    found = []
    for bound in metadata:
        match bound:
            case Ge(ge=number):
                found.append(f"≥ {number:g}")
            case Gt(gt=number):
                found.append(f"> {number:g}")
            case Le(le=int(number)) | Lt(lt=int(number)) if number >= LARGEST:
                pass  # such a bound keeps out what is no number of anything
            case Le(le=number):
                found.append(f"≤ {number:g}")
            case Lt(lt=number):
                found.append(f"< {number:g}")
    return " " + ", ".join(found) if found else ""


def with_settings(text: str) -> str:
    """Return the README's text with fresh tables: of the settings, and of who reads which file."""
    text = _between(text, READERS_BEGIN, READERS_END, table_text())
    return _between(text, BEGIN, END, settings_text())


def _between(text: str, begin: str, end: str, new: str) -> str:
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n\n{new}\n\n{end}", text, flags=re.S)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    if BEGIN not in before:
        sys.exit(f"{README} has no place for the settings: {BEGIN}")
    README.write_text(with_settings(before), encoding="utf-8")
