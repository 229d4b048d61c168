"""The settings of a run that are not what they would be if nothing was said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sdtrain.config.presets import preset_values
from sdtrain.config.schema import Config


@dataclass(frozen=True)
class Setting:
    """One setting: its key, its value and its default as a person would write them; no default where it has none."""

    key: str
    value: str
    default: str


def differing(config: Config) -> list[Setting]:
    """Return the settings that differ from their defaults or have none; of the optimizer, from its preset's values."""
    usual = {f"optimizer.{key}": value for key, value in preset_values(config.optimizer.preset).items()}
    return [
        Setting(key, _text(value), "" if default is PydanticUndefined else _text(default))
        for key, value, default in _leaves(config, "", usual)
        if default is PydanticUndefined or value != default
    ]


def _leaves(section: BaseModel, path: str, usual: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield key, value and default of every setting; the entries of a list of sections one by one."""
    for name, declared in type(section).model_fields.items():
        key, value = f"{path}{name}", getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{key}.", usual)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, entry in enumerate(value):
                yield from _leaves(entry, f"{key}[{index}].", usual)
        else:
            yield key, value, usual.get(key, declared.get_default(call_default_factory=True))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_text(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(_text(one) for one in value) or "none"
    if isinstance(value, str):
        return value or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)
