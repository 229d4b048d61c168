"""What may change between two sittings of a run: all that cannot corrupt what was trained. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sdtrain.config.read import differences
from sdtrain.config.schema import Config
from sdtrain.errors import Problem

CHANGEABLE = (
    *(
        "steps",
        "output",
        "device",
        "deterministic",
        "preview.",
        "checkpoint.",
        "export.",
        "memory.",
        "parallel.",
        "tracking.",
        "data.cache",
    ),
    *("model.dtype", "model.base_precision", "optimizer.d_coef", "optimizer.prodigy_steps", "optimizer.freeze_share"),
    *("validation.every", "validation.patience"),
)
"""The settings that a resumed run may change: none changes what was computed before, or what it means."""
SPLIT = ("data.batch_size", "data.gradient_accumulation")
"""How a step is computed: they may change together, as long as a step has as many pictures."""
MORE = re.compile(r"\+\d{1,18}")


def with_more_steps(table: Mapping[str, Any], planned: int) -> dict[str, Any]:
    """Return the table with `steps = "+500"` as a number: so many more than were planned before."""
    steps = table.get("steps")
    return {**table, "steps": planned + int(str(steps))} if wants_more(steps) else dict(table)


def wants_more(steps: object) -> bool:
    """Return whether a value of `steps` is a text like "+500"."""
    return isinstance(steps, str) and MORE.fullmatch(steps.strip()) is not None


def refused_changes(config: Config, stored: Config, *, accept_data: bool) -> list[Problem]:
    """Return a problem, with both values, for every setting that must be as it was when the run began and is not.

    accept_data: whether the folders of pictures may be others; what is in them is looked at elsewhere.
    """
    before, after = json.loads(stored.model_dump_json()), json.loads(config.model_dump_json())
    problems = []
    for path, old, new in differences(before, after):
        if path in SPLIT or path.startswith(CHANGEABLE):
            continue
        if path.startswith("data.folder"):
            if not accept_data:
                problems.append(Problem(path, _change(old, new, "add --accept-data, "), (path,)))
            continue
        problems.append(Problem(path, _change(old, new), (path, *_decided_by(path))))
    return [*problems, *_pictures_a_step(config, stored)]


def _change(old: Any, new: Any, way_out: str = "") -> str:
    return f"was {old!r} when this run began, is {new!r} now; {way_out}change it back or start a run of another name"


def _pictures_a_step(config: Config, stored: Config) -> list[Problem]:
    was, now = stored.data, config.data
    if was.batch_size * was.gradient_accumulation == now.batch_size * now.gradient_accumulation:
        return []
    where = SPLIT[0] if was.batch_size != now.batch_size else SPLIT[1]
    what = (
        f"times gradient_accumulation was {was.batch_size} x {was.gradient_accumulation} when this run began, is "
        f"{now.batch_size} x {now.gradient_accumulation} now; a step must keep its "
        f"{was.batch_size * was.gradient_accumulation} pictures: change both, or start a run of another name"
    )
    if where == SPLIT[1]:
        what = what.replace("times gradient_accumulation", "times batch_size", 1)
    return [Problem(where, what, SPLIT)]


def _decided_by(setting: str) -> tuple[str, ...]:
    """Return the settings that a setting follows from where it is not set itself."""
    if setting.startswith("optimizer."):
        return ("optimizer.preset", "method.kind", "method.train")
    return ("method.kind",) if setting.startswith("method.") else ()
