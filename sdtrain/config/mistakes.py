"""Turns what the schema finds wrong in a plain table into words for the person who wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sdtrain.config.foreign_settings import FOREIGN, is_foreign_table, nearest_foreign
from sdtrain.config.paths import Location, begins_with, holds, location_of, path_text
from sdtrain.config.schema import Config, FullConfig, LoraConfig

Table = dict[str, Any]

PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text in quotes",
    "a valid boolean": "true or false",
    "a valid list": "a list in brackets",
    "a valid tuple": "a list in brackets",
    "a valid dictionary": "a table of names and values",
}
"""What is allowed, in the words of TOML instead of the checking library's."""
HINTS: dict[Location, str] = {
    ("method", "lr"): "; a network that is not to move is left out of method.train, or ended by method.stop",
    ("optimizer", "lr"): "; it is a factor of the step size that is found, leave it at 1",
    ("optimizer", "d_coef"): "; it is a factor of the d that is found, leave it out unless you know better",
    ("optimizer", "d0"): "; it is the first guess of d, which grows from there",
}
"""What to do instead, where somebody sets one of these to 0 or below."""


@dataclass(frozen=True)
class Mistake:
    """One setting that is wrong, and what is wrong with it.

    unknown: whether there is no such setting. meant: the setting that a misspelt one most likely stands for, whose
    value is then not known.
    """

    setting: Location
    what: str
    unknown: bool = False
    meant: Location | None = None


def mistakes_in(errors: Sequence[ErrorDetails], table: Table) -> list[Mistake]:
    """Return one mistake per setting, from what pydantic says about a table.

    The settings in a section of another tool have one each, before that of the section itself.
    """
    mistakes = _one_each([_mistake(details, table) for details in errors])
    return [each for mistake in mistakes for each in (*_inside(mistake, table), mistake)]


def all_settings() -> list[str]:
    """Return the paths of all settings as errors print them.

    Of a list of tables only the settings of the first are there: `data.folder[0].path`.
    """
    return [*_settings_below(Config, ""), *(f"method.{name}" for name in FullConfig.model_fields)]


def _mistake(details: ErrorDetails, table: Table) -> Mistake:
    setting = _setting(details, table)
    match details["type"]:
        case "extra_forbidden":
            what, meant = _unknown(setting, table)
            return Mistake(setting, what, unknown=True, meant=meant)
        case "missing" if isinstance(setting[-1], int):
            return Mistake(setting[:-1], f"found {_shown(details['input'])}, which has too few entries")
        case "missing":
            return Mistake(setting, "is missing and has no default")
        case "union_tag_not_found":
            return Mistake((*setting, "kind"), 'is missing; write kind = "lora" or kind = "full"')
        case "union_tag_invalid":
            found = details["input"].get("kind")
            return Mistake((*setting, "kind"), f'{found!r} is not known; allowed: "lora", "full"')
        case "model_type":
            return Mistake(setting, f"found {_shown(details['input'])}, where a section stands: [{path_text(setting)}]")
        case _:
            message = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            message = PLAIN.get(re.split(r"[,;]| or ", message)[0], message)
            hint = HINTS.get(setting[:2], "") if details["type"] == "greater_than" else ""
            return Mistake(setting, f"found {_shown(details['input'])}; allowed: {message}{hint}")


def _setting(details: ErrorDetails, table: Table) -> Location:
    """Return where in the table an error lies: pydantic's location without its own labels for the members of unions."""
    labelled = details["loc"]
    if len(labelled) > 1 and labelled[0] == "method":
        labelled = ("method", *labelled[2:])  # the second is the kind of method
    setting: list[str | int] = []
    value: Any = table
    for position, part in enumerate(labelled):
        inside = part < len(value) if isinstance(part, int) and isinstance(value, list) else False
        inside = inside or (isinstance(value, dict) and part in value)
        if inside:
            value = value[part]
        if inside or (details["type"] == "missing" and position == len(labelled) - 1):
            setting.append(part)
    return tuple(setting)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of a number with thousands of digits, of a thousand lists in one another
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(setting: Location, table: Table) -> tuple[str, Location | None]:
    """Return what to say about a setting that does not exist, and the setting that is most likely meant."""
    key = str(setting[-1])
    elsewhere = [path for path in all_settings() if path.rpartition(".")[2] == key]
    if key in FOREIGN and not elsewhere:
        answer = FOREIGN[key]
        meant = location_of(answer.setting) if answer.setting else None
        return answer.sentence(), None if meant is None or holds(table, meant) else meant
    at_home = _is_ours(setting[:-1])
    fields = set(_fields_at(setting[:-1], table))
    if is_foreign_table(key, _at(table, setting), _own_names()):
        return "a section of sd-scripts; `sdtrain import-kohya` makes a config of such a file", None
    near = get_close_matches(key, fields, n=1, cutoff=0.6) if at_home else []
    if near:
        meant = (*setting[:-1], near[0])
        return f"unknown setting; did you mean `{near[0]}`?", None if holds(table, meant) else meant
    if elsewhere:
        meant = location_of(elsewhere[0])
        return f"unknown setting here; did you mean `{elsewhere[0]}`?", None if holds(table, meant) else meant
    if foreign := nearest_foreign(key):
        return f"unknown setting; if it is `{foreign}`: {FOREIGN[foreign].sentence()}", None
    return f"unknown setting; known here: {', '.join(sorted(fields))}" if at_home else "unknown setting", None


def _inside(mistake: Mistake, table: Table) -> Iterator[Mistake]:
    """Yield a mistake for each setting in a section of another tool, however deep."""
    if not mistake.unknown:
        return
    section = _at(table, mistake.setting)
    if not is_foreign_table(str(mistake.setting[-1]), section, _own_names()):
        return
    tables = list(enumerate(section)) if isinstance(section, list) else [(None, section)]
    for index, inner in tables:
        above = mistake.setting if index is None else (*mistake.setting, index)
        for key in inner:
            what, meant = _unknown((*above, key), table)
            each = Mistake((*above, key), what, unknown=True, meant=meant)
            yield from list(_inside(each, table)) or [each]


def _own_names() -> set[str]:
    """Return the names of all settings, without their sections."""
    return {path.rpartition(".")[2] for path in all_settings()}


def _at(table: Table, setting: Location) -> Any:
    """Return what stands at a setting of a table."""
    value: Any = table
    for part in setting:
        value = value[part]
    return value


def _is_ours(location: Location) -> bool:
    """Return whether a section is one of ours, so that its own settings can be meant."""
    return not location or location[0] in Config.model_fields


def _fields_at(location: Location, table: Table) -> Iterator[str]:
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


def _settings_below(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation, "lora")
        if inner is None:
            yield prefix + name
        else:
            entry = "[0]" if get_origin(field.annotation) is list else ""
            yield from _settings_below(inner, f"{prefix}{name}{entry}.")


def _one_each(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Keep one mistake per setting, with what the others allow, for unions report a value once per member.

    Where one member accepts a list and only an entry of it is wrong, it does not count that the whole is no other
    member.
    """
    merged: dict[Location, Mistake] = {}
    for mistake in mistakes:
        first = merged.setdefault(mistake.setting, mistake)
        if "allowed: " in mistake.what and mistake.what != first.what:
            allowed = mistake.what.partition("allowed: ")[2]
            merged[mistake.setting] = Mistake(first.setting, f"{first.what} or {allowed}", first.unknown, first.meant)
    return [
        mistake
        for place, mistake in merged.items()
        if not any(other != place and begins_with(other, place) for other in merged)
    ]
