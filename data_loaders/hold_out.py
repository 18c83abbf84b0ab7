"""A validation split of *train*: which rows are held out is a pure function of (seed, row), whatever the rest holds.

For choosing options (sweeps): the test split stays unseen until the choice is made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError
from raycon.core.stream import key, uniforms

from .datasets import ImageSet

_HELD_OUT = 0x4E1D


def held_out_rows(rows: int, share: float, seed: int) -> NDArray[np.bool_]:
    """(rows,) bool: True for the rows held out, each with probability ``share``, by (seed, row) alone."""
    return uniforms(key(seed, _HELD_OUT), 0, np.arange(rows), 0, 1)[:, 0] < share


def hold_out(dataset: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(the rows to train on, the rows held out) of a train split. Images in one array are copied.

    Raises ConfigError when ``share`` (0..1) leaves nothing on one side.
    """
    held = held_out_rows(len(dataset), share, seed)
    if not 0 < share < 1 or held.all() or not held.any():
        raise ConfigError(
            [
                f"data.validation = {share}: holds out {int(held.sum())} of {len(dataset)} images; give a share above 0 "
                "and below 1 that leaves some on both sides, or 0 for no validation split"
            ]
        )
    kept, apart = np.flatnonzero(~held), np.flatnonzero(held)
    return dataset.subset(kept, split="train"), dataset.subset(apart, split="validation")
