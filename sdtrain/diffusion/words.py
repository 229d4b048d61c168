"""The words of the settings that mathematics obeys: what is predicted, weighted and drawn; no torch."""

from __future__ import annotations

from typing import Literal

Prediction = Literal["epsilon", "v_prediction"]


LossKind = Literal["l2", "l1", "huber", "smooth_l1"]


HuberSchedule = Literal["constant", "snr", "exponential"]


Weighting = Literal["none", "min_snr", "debiased", "debiased_kohya", "scale_v_like_noise"]


Density = Literal["uniform", "logit_normal"]


Sampler = Literal["euler", "euler_a", "dpmpp_2m_karras", "unipc"]
