"""Masks at the size of latents: the share of what each latent pixel stands for, exactly."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
import torch
from torch import Tensor

from sdtrain.data.buckets import Placement
from sdtrain.families.words import LATENT_FACTOR_PX

AREA_VERSION = 1
"""Part of every cache key: raise it when a change here changes what comes out."""
_NOTHING = 1e-9  # of a pixel: what is left of one that only rounding lets in


def at_latent_size(levels: np.ndarray, placement: Placement) -> Tensor:
    """Return the mean of a mask over what each latent pixel stands for, (h, w) float32 from 0 to 1.

    levels: how much each pixel of the upright picture counts, (height, width) from 0 to 255. It goes into the bucket
    as the picture does. A pixel at an edge counts by the share of it that lies inside, so that what is 0 all over is
    exactly 0 and what is 255 all over exactly 1.
    """
    left, top, right, bottom = placement.source_box
    width, height = (side // LATENT_FACTOR_PX for side in placement.bucket)
    rows = _means(levels, top, bottom, height)
    means = torch.from_numpy((_means(rows.T, left, right, width).T / 255.0).astype(np.float32))
    return means.flip(1) if placement.flipped else means


def _means(levels: np.ndarray, start: float, stop: float, num: int) -> np.ndarray:
    """The means of so many stripes of rows between two places, which may lie within a row, (num, width) float64."""
    means = np.empty((num, levels.shape[1]))
    for index, (first, last) in enumerate(pairwise(np.linspace(start, stop, num + 1))):
        rows = np.arange(min(int(first), len(levels) - 1), min(ceil(last), len(levels)))
        shares = np.minimum(rows + 1, last) - np.maximum(rows, first)
        shares[shares < _NOTHING] = 0.0
        means[index] = shares @ levels[rows[0] : rows[-1] + 1] / shares.sum()
    return means
