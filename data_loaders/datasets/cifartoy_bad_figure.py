"""cifartoy-bad-figure: MaskCon's toy set from CIFAR-10, mixed coarse classes, as the paper's t-SNE figure suggests. See data_loaders/cifartoy.py."""

from __future__ import annotations

from pathlib import Path

from .. import cifartoy
from . import ArraySet


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` holds cifar-10-batches-py. Raises ConfigError for an unknown split and missing or damaged files."""
    return cifartoy.open_kind("bad-figure", root, split)
