"""cifar100: 60,000 colour images of 32x32, 100 classes in 20 superclasses (Krizhevsky 2009), which are the weak labels."""

from __future__ import annotations

from pathlib import Path

from .. import cifar_files
from . import ArraySet, unknown_split

SPLITS = ("train", "test")


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` holds cifar-100-python. Raises ConfigError for an unknown split and missing or damaged files."""
    if split not in SPLITS:
        raise unknown_split("cifar100", split, SPLITS)
    batch = cifar_files.read(root, "cifar100", "cifar-100-python", split, fine_labels=100, coarse_labels=20)
    return ArraySet(
        name="cifar100",
        split=split,
        label=batch["fine_labels"],
        weak=batch["coarse_labels"],
        classes=tuple(f"class {i}" for i in range(100)),
        weak_classes=tuple(f"superclass {i}" for i in range(20)),
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        images=cifar_files.pixels(batch["data"]),
    )
