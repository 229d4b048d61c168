"""A TOML file becomes a Config, or one error that lists everything that is wrong with it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sdtrain.config.foreign_settings import REFUSED
from sdtrain.config.presets import preset_values
from sdtrain.config.rules import impossible_pairs
from sdtrain.config.schema import Config, FullConfig, LoraConfig, OptimizerConfig
from sdtrain.errors import Problem, UserError, user_error

Table = dict[str, Any]


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a TOML file, with `key=value` overrides and the preset's values filled in.

    Raises UserError with every problem found: syntax, unknown keys, wrong types, values out of range, impossible pairs.
    """
    return resolve(read_table(path, overrides), str(path))


def read_table(path: Path, overrides: Sequence[str] = ()) -> Table:
    """The plain table in a TOML file with the overrides put in. Raises UserError."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise user_error(str(path), "file", "no such file") from None
    except IsADirectoryError:
        raise user_error(str(path), "file", "is a folder; name a .toml file") from None
    except UnicodeDecodeError:
        raise user_error(str(path), "file", "is not text in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise user_error(
            str(path), "syntax", f"{error}; strings stand in quotes, `true` and `false` are lower case"
        ) from None
    override_table(table, overrides)
    return table


def override_table(table: Table, overrides: Sequence[str]) -> None:
    """Put `key=value` settings into a plain table, in place. Raises UserError for what is not key=value."""
    problems = [problem for override in overrides if (problem := _override(table, override))]
    if problems:
        raise UserError("--set", problems)


def resolve(table: Table, source: str) -> Config:
    """The Config a table means, preset filled in. Raises UserError naming `source`."""
    try:
        config = Config.model_validate(with_preset(table))
    except ValidationError as error:
        problems = [_problem(details, table) for details in error.errors(include_url=False)]
        raise UserError(source, _without_repeats(problems)) from None
    problems = impossible_pairs(config)
    if problems:
        raise UserError(source, problems)
    return config


def with_preset(table: Table) -> Table:
    """The table with the preset's optimizer values below the user's own. Left alone where it is not well-formed."""
    optimizer, steps = table.get("optimizer", {}), table.get("steps")
    if not isinstance(optimizer, dict) or not isinstance(steps, int):
        return table
    method = table.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    preset = optimizer.get("preset", "full" if kind == "full" else "lora")
    if preset not in get_args(OptimizerConfig.model_fields["preset"].annotation):
        return table
    values = preset_values(preset, steps)
    if optimizer.get("split_groups") is False:
        values["split_groups_mean"] = "off"  # one d for all leaves nothing to average
    return {**table, "optimizer": {"preset": preset, **values, **optimizer}}


def _override(table: Table, override: str) -> Problem | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return Problem(override, "write it as key=value, for example steps=500 or preview.every=100")
    *path, last = key.split(".")
    for name in path:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            return Problem(key, f"`{name}` is not a table in the config")
        table = inner
    table[last] = _override_value(text.strip())
    return None


def _override_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --set name=cats


def _problem(details: ErrorDetails, table: Table) -> Problem:
    where = _where(details["loc"])
    last = str(details["loc"][-1]) if details["loc"] else ""
    match details["type"]:
        case "extra_forbidden":
            return Problem(where, _unknown(last, details["loc"], table))
        case "missing":
            return Problem(where, "is missing and has no default")
        case "union_tag_not_found":
            return Problem(f"{where}.kind", 'is missing; write kind = "lora" or kind = "full"')
        case "union_tag_invalid":
            return Problem(f"{where}.kind", f'{details["input"].get("kind")!r} is not known; allowed: "lora", "full"')
        case _:
            message = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            return Problem(where, f"found {_shown(details['input'])}; allowed: {message}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _where(location: Sequence[int | str]) -> str:
    """`data.folder[0].path` for ("data", "folder", 0, "path"); pydantic's own labels of union members are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("lora", "full", "int", "str", "float"):
            text += f".{part}" if text else part
    return text or "config"


def _unknown(key: str, location: Sequence[int | str], table: Table) -> str:
    if key in REFUSED:
        return REFUSED[key]
    fields = set(_fields_at(location[:-1], table))
    near = get_close_matches(key, fields, n=1, cutoff=0.6)
    if near:
        return f"unknown setting; did you mean `{near[0]}`?"
    elsewhere = [path for path in all_settings() if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown setting here; did you mean `{elsewhere[0]}`?"
    return f"unknown setting; known here: {', '.join(sorted(fields))}"


def _fields_at(location: Sequence[int | str], table: Table) -> Iterator[str]:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = _model_in(model.model_fields[part].annotation, _kind(table))
            model = inner or model
    yield from model.model_fields


def _kind(table: Table) -> str:
    method = table.get("method")
    return str(method.get("kind")) if isinstance(method, dict) else "lora"


def _model_in(annotation: Any, kind: str) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType) and LoraConfig in get_args(annotation):
        return FullConfig if kind == "full" else LoraConfig
    for argument in get_args(annotation):
        if get_origin(annotation) is not Literal and (found := _model_in(argument, kind)):
            return found
    return None


def all_settings() -> list[str]:
    """Dotted paths of every setting, lists written as `data.folder.path`."""
    return [*_settings_below(Config, ""), *(f"method.{name}" for name in FullConfig.model_fields)]


def _settings_below(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation, "lora")
        if inner is None:
            yield prefix + name
        else:
            yield from _settings_below(inner, f"{prefix}{name}.")


def _without_repeats(problems: Sequence[Problem]) -> list[Problem]:
    """Unions report a value once per member; keep the first of each place, with what the others allow."""
    merged: dict[str, str] = {}
    for problem in problems:
        if problem.where not in merged:
            merged[problem.where] = problem.what
        elif "allowed: " in problem.what and problem.what != merged[problem.where]:
            merged[problem.where] += " or " + problem.what.partition("allowed: ")[2]
    return [Problem(where, what) for where, what in merged.items()]


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted setting, value before, value after) of everything that differs between two resolved configs."""
    found = []
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found
