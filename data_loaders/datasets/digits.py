"""digits: scikit-learn's 1,797 handwritten digits, 8x8 gray, the set that comes with the installation.

It has no official split: train is the first 1,437 rows in scikit-learn's order, test the last 360. The order is that of
the writers' forms, so train and test hardly share writers. Pixels 0..16 are scaled to 0..255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import ArraySet, no_labels, unknown_split

TRAIN_ROWS = 1437
SPLITS = {"train": slice(0, TRAIN_ROWS), "test": slice(TRAIN_ROWS, None)}


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` is not used: the images are part of scikit-learn. Raises ConfigError for an unknown split."""
    from sklearn.datasets import load_digits

    if split not in SPLITS:
        raise unknown_split("digits", split, tuple(SPLITS))
    digits = load_digits()
    images = np.rint(digits.images[SPLITS[split]] * (255 / 16)).astype(np.uint8)
    label = digits.target[SPLITS[split]].astype(np.int64)
    return ArraySet(
        name="digits",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=tuple(str(digit) for digit in range(10)),
        mean=(0.3054,),
        std=(0.3753,),
        images=images[..., None],
    )
