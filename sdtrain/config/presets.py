"""Named sets of optimizer values for diffusion gradients, and what each is for.

Diffusion gradients keep rising and falling with the timestep that happens to be drawn, so that d, which can only grow,
keeps creeping up long after it was large enough ("escape velocity"). The presets freeze it when a share of the planned
steps is done and it is at rest, never while it climbs, start it where a run of that kind gets off the ground in few
steps, and apply less of it the longer a run is, and more in a short one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, assert_never, get_args

from sdtrain.config.schema import Config, OptimizerConfig, Preset
from sdtrain.errors import Problem
from sdtrain.families.words import DENOISER, TRAINABLE_NETWORKS

FREEZE_SHARE = 0.25
WHOLE_D_STEPS, LEAST_D_COEF, MOST_D_COEF = 400, 0.25, 2.0
"""Runs of so many steps apply d as it is found. Longer ones apply less of it and shorter ones more, up to these."""
LEAST_TRAVEL = 1e-4
"""Weights that move by less than this in all, even if every step goes in one direction, change no picture."""
LIMIT_OF_GROWTH = 2**0.25
"""With `optimizer.d_limiter`, d grows by at most this factor per step."""

FITS: dict[Preset, tuple[str, bool]] = {
    "lora": ("lora", False),
    "lora-text-encoders": ("lora", True),
    "full": ("full", False),
    "full-text-encoders": ("full", True),
}
"""What the presets for one kind of training are for: `method.kind`, and whether text encoders must be trained."""


def preset_values(preset: Preset) -> dict[str, Any]:
    """Return the optimizer settings that a preset means. Values that the user sets take precedence over them."""
    freeze = {"prodigy_steps": "auto", "freeze_share": FREEZE_SHARE, "d_coef": "auto"}
    match preset:
        case "lora":
            return {**freeze, "d0": 1e-4, "split_groups_mean": "harmonic_mean"}
        case "lora-text-encoders":
            return {**freeze, "d0": 5e-5, "split_groups_mean": "off"}
        case "full":
            return {**freeze, "d0": 1e-6, "split_groups_mean": "harmonic_mean"}
        case "full-text-encoders":
            return {**freeze, "d0": 1e-6, "split_groups_mean": "off"}
        case "auto-freeze":
            return {"prodigy_steps": "auto"}
        case "never-freeze":
            return {"prodigy_steps": 0}
        case _:
            assert_never(preset)


def fitting_preset(kind: object, train: object) -> Preset:
    """Return the preset for what is trained: the values of `method.kind` and `method.train`, as far as they are known.

    train: names of networks; anything else is taken for the denoiser alone.
    """
    encoders = isinstance(train, list) and any(name in TRAINABLE_NETWORKS and name != DENOISER for name in train)
    if kind == "full":
        return "full-text-encoders" if encoders else "full"
    return "lora-text-encoders" if encoders else "lora"


def with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """A plain table with the preset's optimizer values below the user's own. Left alone where it is not well-formed."""
    optimizer = table.get("optimizer", {})
    if not isinstance(optimizer, dict):
        return table
    method = table.get("method")
    known = method if isinstance(method, dict) else {}
    preset = optimizer.get("preset", fitting_preset(known.get("kind"), known.get("train")))
    if preset not in get_args(OptimizerConfig.model_fields["preset"].annotation):
        return table
    values = preset_values(preset)
    if optimizer.get("prodigy_steps", "auto") != "auto":
        values.pop("freeze_share", None)  # a number is the step itself
    if optimizer.get("split_groups") is False:
        values["split_groups_mean"] = "off"  # one d for all leaves nothing to average
    return {**table, "optimizer": {"preset": preset, **values, **optimizer}}


def d_coef_of(config: Config) -> float:
    """Return the factor of d with which a run begins: the longer it is planned, the smaller its steps.

    d is the size of step that is right for a few hundred. Repeated for long, it learns the pictures by heart, and a
    hundred of them fall short, as the best learning rate of AdamW falls with the length of a run (README, "Beside a
    swept AdamW"): with the inverse of a longer run's length, and with the root of it among short ones.
    """
    chosen = config.optimizer.d_coef
    if chosen != "auto":
        return chosen
    share = WHOLE_D_STEPS / config.steps
    return max(LEAST_D_COEF, share) if share < 1 else min(MOST_D_COEF, math.sqrt(share))


def misfits(config: Config) -> Iterator[Problem]:
    """Yield a problem for a preset of another method, or for text encoders where none is trained."""
    method, preset = config.method, config.optimizer.preset
    if preset not in FITS:
        return
    kind, with_encoders = FITS[preset]
    fitting = fitting_preset(method.kind, method.train)
    if kind != method.kind:
        yield Problem(
            "optimizer.preset", f'{preset}, but method.kind = "{method.kind}"; leave it out, and {fitting} is chosen'
        )
    elif with_encoders and fitting != preset:
        yield Problem(
            "optimizer.preset",
            f"{preset}, but no text encoder is trained: method.train = {list(method.train)}; leave it out, and "
            f"{fitting} is chosen",
        )


def first_useful_step(d0: float, fixed: int) -> int:
    """Return the number of steps in which a weight can have moved by LEAST_TRAVEL, if d grows as fast as it may.

    fixed: the number of steps after which d grows no more.
    """
    d, travel, step = d0, d0, 1
    while travel < LEAST_TRAVEL and step < fixed:
        d *= LIMIT_OF_GROWTH
        travel += d
        step += 1
    return step + max(0, math.ceil((LEAST_TRAVEL - travel) / d))
