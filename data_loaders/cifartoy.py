"""MaskCon's CIFARtoy (arXiv 2303.12756): CIFAR-10 without deer and frog, 8 fine classes in 2 coarse ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import cifar_files, coarse
from .datasets import ArraySet, unknown_split

FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def open_kind(kind: str, root: Path | None, split: str) -> ArraySet:
    """The images class by class in the published order. Raises ConfigError for an unknown split or missing files."""
    name = f"cifartoy-{kind}"
    if split not in FILES:
        raise unknown_split(name, split, tuple(FILES))
    batches = [cifar_files.read(root, name, "cifar-10-batches-py", file) for file in FILES[split]]
    label = np.concatenate([np.asarray(b["labels"], dtype=np.int64) for b in batches])
    rows = np.concatenate([np.flatnonzero(label == c) for c in coarse.cifartoy_order(kind)])
    images = cifar_files.pixels(np.concatenate([b["data"] for b in batches]))
    fine = coarse.cifartoy_fine(kind)
    ten = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return ArraySet(
        name=name,
        split=split,
        label=fine[label[rows]],
        weak=coarse.cifartoy_coarse(kind)[label[rows]],
        classes=tuple(ten[int(np.flatnonzero(fine == i)[0])] for i in range(8)),
        weak_classes=("coarse 0", "coarse 1"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        images=images[rows],
    )
