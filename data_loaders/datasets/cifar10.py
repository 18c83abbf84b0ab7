"""cifar10: 60,000 colour images of 32x32 in 10 classes (Krizhevsky 2009), from its Python batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import cifar_files
from . import ArraySet, no_labels, unknown_split

FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` holds cifar-10-batches-py. Raises ConfigError for an unknown split and missing or damaged files."""
    if split not in FILES:
        raise unknown_split("cifar10", split, tuple(FILES))
    batches = [
        cifar_files.read(root, "cifar10", "cifar-10-batches-py", file, labels=len(CLASSES)) for file in FILES[split]
    ]
    label = np.concatenate([batch["labels"] for batch in batches])
    return ArraySet(
        name="cifar10",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        images=cifar_files.pixels(np.concatenate([batch["data"] for batch in batches])),
    )
