"""What a run's settings mean that its user may not expect, said before it begins; none of it is a mistake."""

from __future__ import annotations

from sdtrain.config.schema import Config
from sdtrain.models.checkpoints.inspect import OpenedModel

WEIGHS_NOISE = ("none", "debiased_kohya")
"""The weightings that give pure noise a weight above 0 where v is predicted."""


def notes(config: Config, facts: OpenedModel) -> list[str]:
    """Return one sentence for each thing to know; most runs have none."""
    return _untrained_noise(config, facts)


def _untrained_noise(config: Config, facts: OpenedModel) -> list[str]:
    zero = config.model.zero_terminal_snr
    ends_in_noise = facts.zero_terminal_snr if zero == "auto" else zero == "on"
    last = facts.num_timesteps - 1
    if not ends_in_noise or config.timesteps.last < last or config.loss.weighting in WEIGHS_NOISE:
        return []
    return [
        f"note: loss.weighting = {config.loss.weighting} gives timestep {last}, pure noise under zero terminal SNR, "
        "the weight 0: it is not trained, though sampling starts there. none and debiased_kohya train it."
    ]
