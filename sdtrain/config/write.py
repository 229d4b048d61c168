"""Turns a Config into TOML again: the resolved config of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdtrain.config.paths import toml_key, toml_string
from sdtrain.config.schema import Config


def config_to_toml(config: Config) -> str:
    """Return TOML text that reads back as the same config."""
    return "\n".join(_table(config.model_dump(mode="python"), "")).strip() + "\n"


def _table(table: Mapping[str, Any], path: str) -> list[str]:
    plain = {key: value for key, value in table.items() if not _is_table(value)}
    lines = [f"{toml_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        name = f"{path}{toml_key(key)}"
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", *_table(value, f"{name}.")]
        elif _is_table(value):
            for entry in value:
                lines += ["", f"[[{name}]]", *_table(entry, f"{name}.")]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
    )


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it in one line, tables inside braces."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return toml_string(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(key)} = {toml_value(entry)}" for key, entry in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(toml_value(entry) for entry in value) + "]"
    return repr(value)
