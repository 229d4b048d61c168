"""Every setting with its place: for `sdtrain explain` and `sdtrain schema`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from sdtrain.commands.front.words import allowed_text, default_text
from sdtrain.config.presets import preset_values
from sdtrain.config.schema import Config, FullConfig, LoraConfig, OptimizerConfig
from sdtrain.config.write import toml_value
from sdtrain.errors import user_error

SCHEMA_DIALECT = "http://json-schema.org/draft-07/schema#"
"""The dialect that editors' TOML plugins (taplo) read."""

CHOICE = "kind"
"""The setting that says which of several sections is meant."""


@dataclass(frozen=True)
class Setting:
    """One setting: its key without places in lists, what it may be, its default as TOML writes it, what it does.

    only: the `method.kind` that it belongs to, empty for both. presets: its value in each preset that gives one.
    """

    key: str
    allowed: str
    default: str
    description: str
    only: str = ""
    presets: tuple[tuple[str, str], ...] = ()


def settings() -> dict[str, Setting]:
    """Return all settings by their keys, in the order of the schema."""
    found: dict[str, Setting] = {}
    for setting in _below(Config, "", ""):
        known = found.get(setting.key)
        if known is None:
            found[setting.key] = setting
        elif known.only and known.only != setting.only and known.description == setting.description:
            found[setting.key] = Setting(setting.key, setting.allowed, setting.default, setting.description)
        elif known.description != setting.description:
            both = f"{known.only}: {known.description} {setting.only}: {setting.description}"
            found[setting.key] = Setting(setting.key, known.allowed, known.default, both)
    return found


def explained(key: str) -> list[Setting]:
    """Return the setting of a key, or all settings of a section, or all of that last name.

    Raises UserError with the nearest keys when there is none.
    """
    known = settings()
    asked = key.strip().strip("[]").replace("[0]", "")
    if asked in known:
        return [known[asked]]
    inside = [setting for name, setting in known.items() if name.startswith(f"{asked}.")]
    same = [setting for name, setting in known.items() if name.rpartition(".")[2] == asked]
    if inside or same:
        return inside or same
    last_names = {name.rpartition(".")[2]: name for name in known}
    near = get_close_matches(asked, known, n=3, cutoff=0.6)
    near += [last_names[name] for name in get_close_matches(asked.rpartition(".")[2], last_names, n=3, cutoff=0.6)]
    told = ", ".join(dict.fromkeys(near))
    what = f"no such setting; did you mean {told}?" if told else "no such setting; `sdtrain explain` lists all"
    raise user_error("explain", key or "KEY", what)


def lines_of(setting: Setting) -> list[str]:
    """Return what there is to tell of a setting, a line each."""
    only = [f'  only with method.kind = "{setting.only}"'] if setting.only else []
    presets = [f"  preset {name}: {value}" for name, value in setting.presets]
    description = setting.description.replace("`", "")
    allowed = setting.allowed.replace("`", "")
    return [setting.key, f"  {description}", f"  allowed: {allowed}", f"  default: {setting.default}", *only, *presets]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors. Rules that join settings are left to `sdtrain check`."""
    schema = Config.model_json_schema()
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "sdtrain config"}


def _below(model: type[BaseModel], prefix: str, only: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        inner = list(_models_in(field.annotation))
        if len(inner) > 1:  # method: its kind, of which each member knows only its own
            choices = ", ".join(allowed_text(section.model_fields[CHOICE]) for section in inner)
            yield Setting(f"{prefix}{name}.{CHOICE}", choices, "required", field.description or "")
        for section in inner:
            kind = {LoraConfig: "lora", FullConfig: "full"}.get(section, only)
            yield from _below(section, f"{prefix}{name}.", kind)
        if not inner and not (only and name == CHOICE):
            given = tuple(_in_presets(name)) if model is OptimizerConfig else ()
            yield Setting(prefix + name, allowed_text(field), default_text(field), field.description or "", only, given)


def _in_presets(name: str) -> Iterator[tuple[str, str]]:
    for preset in get_args(OptimizerConfig.model_fields["preset"].annotation):
        values = preset_values(preset)
        if name in values:
            yield preset, toml_value(values[name])


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _models_in(argument)
