"""What may stand in a setting, in words."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sdtrain.config.write import toml_value

LARGEST = 1_000_000_000
"""A bound from here on keeps out what is no number of anything, and is not worth telling."""


def allowed_text(field: FieldInfo) -> str:
    """Return what a setting may be, choices in backquotes: "whole number ≥ 1", "`lora`, `full`"."""
    return _named(field.annotation, field.metadata)


def default_text(field: FieldInfo) -> str:
    """Return a setting's default as TOML writes it, or "required"."""
    if field.is_required():
        return "required"
    return toml_value(list(field.default) if isinstance(field.default, tuple) else field.default)


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
                pass
            case Le(le=number):
                found.append(f"≤ {number:g}")
            case Lt(lt=number):
                found.append(f"< {number:g}")
    return " " + ", ".join(found) if found else ""
