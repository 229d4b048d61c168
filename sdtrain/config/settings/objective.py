"""The settings of what is learnt: noise levels, noise, loss, and what is kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sdtrain.config.settings.values import Settings, Whole
from sdtrain.diffusion.words import Density, HuberSchedule, LossKind, Weighting


class TimestepConfig(Settings):
    """The noise levels that are trained, and how often each is drawn."""

    density: Density = Field(default="uniform", description="How timesteps are drawn.")
    logit_mean: float = Field(default=0.0, description="Mean of logit(t), for `logit_normal`.")
    logit_std: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Deviation of logit(t).")
    first: Whole = Field(default=0, description="Lowest timestep that is trained.")
    last: Annotated[int, Field(ge=1)] = Field(default=999, description="Highest timestep that is trained.")


class NoiseConfig(Settings):
    """The noise that is added."""

    offset: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Noise shared by a whole channel.")
    pyramid_discount: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="0: off; else coarser and coarser noise is added with this factor a level."
    )
    input_perturbation: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Extra noise on the input only, not on the target."
    )


class LossConfig(Settings):
    """How the error of a prediction is measured and weighted."""

    kind: LossKind = Field(
        default="l2",
        description="Squared error; absolute error; Huber's: squared for small errors and linear for large ones; or "
        "`smooth_l1`, Huber's divided by delta.",
    )
    huber_delta: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="Where the error of `huber` and `smooth_l1` turns linear; `huber_c` in sd-scripts."
    )
    huber_schedule: HuberSchedule = Field(
        default="constant",
        description="`constant`: huber_delta at every timestep (it is `snr` where sd-scripts is not told). `snr`, "
        "`exponential`: from 1 without noise to huber_delta at the last timestep, along sqrt(SNR) or as "
        "huber_delta^(t / T).",
    )
    weighting: Weighting = Field(
        default="none",
        description="Weight of each timestep. `min_snr`; `debiased`: 1/sqrt(SNR) of the noise's error, which is "
        "sqrt(SNR)/(SNR + 1) for v_prediction; `debiased_kohya`: as sd-scripts has it, 1/(SNR + 1) for v_prediction; "
        "`scale_v_like_noise`: SNR/(SNR + 1), for v_prediction only. Under zero terminal SNR all but `none` and "
        "`debiased_kohya` give v's last timestep the weight 0.",
    )
    min_snr_gamma: Annotated[float, Field(gt=0)] = Field(default=5.0, description="Gamma of min-SNR weighting.")


class PreserveConfig(Settings):
    """Keeping what the model knew: the base without its adapters teaches the adapted model its own answers."""

    weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="0: off. How much a difference from the base counts beside the error of the pictures; 1 is a good "
        "start. A step takes about 2.3 times as long.",
    )
    captions: list[str] = Field(
        default=[""],
        min_length=1,
        description="What must be answered as before, drawn for each picture anew: captions near the new thing that do "
        'not name it, "a photo of a dog" for a dog of yours. The empty one is no caption.',
    )
