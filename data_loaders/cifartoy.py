"""MaskCon's CIFARtoy (arXiv 2303.12756): CIFAR-10 without deer and frog, 8 fine classes in 2 coarse ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import cifar_files, coarse
from .datasets import ArraySet, cifar10, unknown_split


def open_kind(kind: str, root: Path | None, split: str) -> ArraySet:
    """The images class by class in the published order. Raises ConfigError for an unknown split or missing files."""
    name = f"cifartoy-{kind}"
    if split not in cifar10.FILES:
        raise unknown_split(name, split, tuple(cifar10.FILES))
    batches = [
        cifar_files.read(root, name, "cifar-10-batches-py", file, labels=len(cifar10.CLASSES))
        for file in cifar10.FILES[split]
    ]
    label = np.concatenate([b["labels"] for b in batches])
    rows = np.concatenate([np.flatnonzero(label == c) for c in coarse.cifartoy_order(kind)])
    images = cifar_files.pixels(np.concatenate([b["data"] for b in batches]))
    fine = coarse.cifartoy_fine(kind)
    return ArraySet(
        name=name,
        split=split,
        label=fine[label[rows]],
        weak=coarse.cifartoy_coarse(kind)[label[rows]],
        classes=tuple(cifar10.CLASSES[int(np.flatnonzero(fine == i)[0])] for i in range(8)),
        weak_classes=("coarse 0", "coarse 1"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        images=images[rows],
    )
