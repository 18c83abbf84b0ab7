"""fashion-mnist-coarse: Fashion-MNIST whose weak labels are four coarse classes over the ten fine ones.

Fine labels stay for evaluations; a method sees only tops, trousers, footwear or bags.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from . import ArraySet, fashion_mnist

COARSE = {
    "tops": ("t-shirt", "pullover", "dress", "coat", "shirt"),
    "trousers": ("trouser",),
    "footwear": ("sandal", "sneaker", "ankle boot"),
    "bags": ("bag",),
}
"""The fine classes of each coarse one."""


def open_split(root: Path | None, split: str) -> ArraySet:
    """Raises ConfigError as fashion-mnist does."""
    fine = fashion_mnist.open_split(root, split)
    of_class = {name: i for i, members in enumerate(COARSE.values()) for name in members}
    coarse = np.array([of_class[name] for name in fine.classes], dtype=np.int64)
    return dataclasses.replace(fine, name="fashion-mnist-coarse", weak=coarse[fine.label], weak_classes=tuple(COARSE))
