"""Named sets of optimizer values for diffusion gradients.

Diffusion gradients keep rising and falling with the timestep that happens to be drawn, so that d, which can only grow,
keeps creeping up long after it was large enough ("escape velocity"). The presets freeze it after a share of the planned
steps, and start it where a run of that kind gets off the ground in few steps.
"""

from __future__ import annotations

from typing import Any, assert_never

from sdtrain.config.schema import Preset

FREEZE_SHARE = 0.25


def preset_values(preset: Preset, steps: int) -> dict[str, Any]:
    """Return the optimizer settings that a preset means for a run of `steps` steps.

    Values that the user sets take precedence over them.
    """
    freeze = max(1, round(FREEZE_SHARE * steps))
    match preset:
        case "lora":
            return {"prodigy_steps": freeze, "d0": 1e-6, "split_groups_mean": "harmonic_mean"}
        case "lora-text-encoders":
            return {"prodigy_steps": freeze, "d0": 1e-5, "split_groups_mean": "off"}
        case "full":
            return {"prodigy_steps": freeze, "d0": 1e-7, "split_groups_mean": "harmonic_mean"}
        case "full-text-encoders":
            return {"prodigy_steps": freeze, "d0": 1e-6, "split_groups_mean": "off"}
        case "auto-freeze":
            return {"prodigy_steps": "auto"}
        case "never-freeze":
            return {"prodigy_steps": 0}
        case _:
            assert_never(preset)
