"""imagenet32: downsampled ImageNet, 1,281,167 images of 32x32 (Chrabaszcz et al. 2017), with MaskCon's 12 coarse classes.

Fine labels are ILSVRC's (sorted wnids); the files' own numbering differs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import cifar_files, coarse
from . import IMAGENET_MEAN, IMAGENET_STD, ArraySet, unknown_split

FILES = {"train": [f"train_data_batch_{i}" for i in range(1, 11)], "test": ["val_data"]}


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` holds the batch files. Raises ConfigError for an unknown split and missing or damaged files."""
    if split not in FILES:
        raise unknown_split("imagenet32", split, tuple(FILES))
    images, labels = [], []
    for file in FILES[split]:
        batch = cifar_files.read(root, "imagenet32", "imagenet32", file, first=1, labels=1000)
        images.append(cifar_files.pixels(batch["data"]))
        labels.append(batch["labels"])
    label = coarse.imagenet32_to_imagenet()[np.concatenate(labels) - 1]
    return ArraySet(
        name="imagenet32",
        split=split,
        label=label,
        weak=coarse.imagenet()[label],
        classes=tuple(f"class {i}" for i in range(1000)),
        weak_classes=tuple(f"coarse {i}" for i in range(12)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        images=np.concatenate(images),
    )
