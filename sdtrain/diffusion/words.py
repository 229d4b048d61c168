"""The words of the settings that mathematics obeys: what is predicted, weighted and drawn; no torch."""

from __future__ import annotations

from typing import Literal

Prediction = Literal["epsilon", "v_prediction"]


LossKind = Literal["l2", "huber"]


Weighting = Literal["none", "min_snr", "debiased"]


Density = Literal["uniform", "logit_normal"]
