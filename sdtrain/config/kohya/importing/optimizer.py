"""From an optimizer and its arguments there to [optimizer] here: only those of Prodigy mean the same."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from sdtrain.config.kohya.importing.findings import Became, Finding, NotNeeded, Unreadable
from sdtrain.config.kohya.importing.options import ForeignConfig, Option
from sdtrain.config.kohya.importing.values import UnreadableError, number
from sdtrain.config.kohya.known import OPTIMIZER_ARGS
from sdtrain.config.schema import OptimizerConfig

_OF_PRODIGY = {"weight_decay": {"least": 0.0}, "d0": {"above": 0.0}, "d_coef": {"above": 0.0}}
_OURS = set(OptimizerConfig.model_fields) - {"preset", "lr"} - set(_OF_PRODIGY)


def translate_optimizer(config: ForeignConfig) -> Iterator[Finding]:
    """Yield what becomes of the optimizer's arguments."""
    kind = config.arguments.find("optimizer_type", "optimizer")
    name = "" if kind is None else str(kind.value).lower()
    for option in config.arguments.all:
        if option.within != "optimizer_args":
            continue
        if "prodigy" not in name:
            if option.name in OPTIMIZER_ARGS:
                yield NotNeeded(option, f"it was chosen for {kind.value if kind else 'another optimizer'}")
        elif option.name in _OF_PRODIGY:
            try:
                value = number(option.value, **_OF_PRODIGY[option.name])
                yield Became(f"optimizer.{option.name}", value, (option,))
            except UnreadableError as error:
                yield Unreadable(option, str(error))
        elif "schedule" in name and option.name in _OURS:
            yield from _same(option)


def _same(option: Option) -> Iterator[Finding]:
    """Yield the setting of the same name of Prodigy + Schedule-Free, whose arguments are ours."""
    value: Any = option.value
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = option.value
    if value is None:
        yield NotNeeded(option, "it is the default here")
    else:
        yield Became(f"optimizer.{option.name}", list(value) if isinstance(value, tuple) else value, (option,))
