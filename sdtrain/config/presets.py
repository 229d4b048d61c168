"""Named sets of optimizer values for diffusion gradients.

Diffusion gradients keep rising and falling with the timestep that happens to be drawn, so that d, which can only grow,
keeps creeping up long after it was large enough ("escape velocity"). The presets freeze it when a share of the planned
steps is done and it is at rest, never while it climbs, and start it where a run of that kind gets off the ground in few
steps.
"""

from __future__ import annotations

from typing import Any, assert_never, get_args

from sdtrain.config.schema import OptimizerConfig, Preset

FREEZE_SHARE = 0.25


def preset_values(preset: Preset) -> dict[str, Any]:
    """Return the optimizer settings that a preset means. Values that the user sets take precedence over them."""
    freeze = {"prodigy_steps": "auto", "freeze_share": FREEZE_SHARE}
    match preset:
        case "lora":
            return {**freeze, "d0": 1e-6, "split_groups_mean": "harmonic_mean"}
        case "lora-text-encoders":
            return {**freeze, "d0": 1e-5, "split_groups_mean": "off"}
        case "full":
            return {**freeze, "d0": 1e-7, "split_groups_mean": "harmonic_mean"}
        case "full-text-encoders":
            return {**freeze, "d0": 1e-6, "split_groups_mean": "off"}
        case "auto-freeze":
            return {"prodigy_steps": "auto"}
        case "never-freeze":
            return {"prodigy_steps": 0}
        case _:
            assert_never(preset)


def with_preset(table: dict[str, Any]) -> dict[str, Any]:
    """A plain table with the preset's optimizer values below the user's own. Left alone where it is not well-formed."""
    optimizer = table.get("optimizer", {})
    if not isinstance(optimizer, dict):
        return table
    method = table.get("method")
    kind = method.get("kind") if isinstance(method, dict) else None
    preset = optimizer.get("preset", "full" if kind == "full" else "lora")
    if preset not in get_args(OptimizerConfig.model_fields["preset"].annotation):
        return table
    values = preset_values(preset)
    if optimizer.get("prodigy_steps", "auto") != "auto":
        values.pop("freeze_share", None)  # a number is the step itself
    if optimizer.get("split_groups") is False:
        values["split_groups_mean"] = "off"  # one d for all leaves nothing to average
    return {**table, "optimizer": {"preset": preset, **values, **optimizer}}
