"""caltech101: Caltech-101, 9,144 pictures of 101 things and a background class (Fei-Fei et al. 2004).

caltech101/101_ObjectCategories/<class>/image_*.jpg. There is no published split: train is 30 pictures of each class,
drawn here once and for all (a permutation that depends on the class's number only), test the others. The classes are
sorted by the bytes of their names, BACKGROUND_Google among them: 102, as the transfer protocol has it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from raycon.core.stream import epoch_order

from . import FileSet, first_folder, image_folder, unknown_split

PER_CLASS = 30


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds caltech101 or 101_ObjectCategories, or is the latter. Raises ConfigError."""
    if split not in ("train", "test"):
        raise unknown_split("caltech101", split, ("train", "test"))
    base = first_folder("caltech101", root, "caltech101/101_ObjectCategories", "101_ObjectCategories", "")
    found = image_folder.read_folder("caltech101", split, base)
    train = np.zeros(len(found), dtype=bool)
    for label in range(len(found.classes)):
        rows = np.flatnonzero(found.label == label)
        train[rows[epoch_order(0, label, len(rows))[:PER_CLASS]]] = True
    rows = np.flatnonzero(train if split == "train" else ~train)
    return dataclasses.replace(found.subset(rows), split=split)
