"""MaskCon's coarse labels (arXiv 2303.12756): which coarse class each fine class of a data set belongs to."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CIFARTOY = ("good", "bad", "bad-figure")
"""good: vehicles and animals. bad: mixed, as the paper's code has it. bad-figure: as its t-SNE figure suggests, with dog
and bird changed over."""


@functools.cache
def _tables() -> dict[str, Any]:
    loaded = json.loads((Path(__file__).parent / "coarse_tables.json").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def cars196() -> NDArray[np.int64]:
    """(196,): fine class (torchvision's order) -> 0..7: pickup, sedan, SUV, convertible, coupe, hatchback, wagon, van."""
    return np.array([int(digit) for digit in _tables()["cars196"]])


def cifar100() -> NDArray[np.int64]:
    """(100,): fine class -> 0..19, the superclasses that the data set itself has."""
    return np.array(_tables()["cifar100"])


def imagenet() -> NDArray[np.int64]:
    """(1000,): ILSVRC class (sorted wnids) -> 0..11: invertebrates, dogs and cats, birds, other mammals, ..."""
    return np.array([int(digit, 16) for digit in _tables()["imagenet"]])


def imagenet32_to_imagenet() -> NDArray[np.int64]:
    """(1000,): label of downsampled ImageNet minus 1 -> ILSVRC class (sorted wnids). A permutation."""
    return np.array(_tables()["imagenet32_to_imagenet"])


def cifartoy_order(kind: str) -> tuple[int, ...]:
    """The CIFAR-10 classes of CIFARtoy in the order its images come in: those of coarse class 0, then those of 1."""
    first, second = _tables()["cifartoy_coarse"][kind]
    return (*first, *second)


def cifartoy_coarse(kind: str) -> NDArray[np.int64]:
    """(10,): CIFAR-10 class -> 0, 1, or -1 for deer and frog, which are left out."""
    coarse = np.full(10, -1)
    for label, members in enumerate(_tables()["cifartoy_coarse"][kind]):
        coarse[members] = label
    return coarse


def cifartoy_fine(kind: str) -> NDArray[np.int64]:
    """(10,): CIFAR-10 class -> fine class 0..7; 8 and 9 are the two that are left out."""
    return np.array(_tables()["cifartoy_fine"][kind])
