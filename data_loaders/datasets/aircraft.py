"""aircraft: FGVC-Aircraft, 10,000 photographs of 100 variants of aircraft (Maji et al. 2013), in 70 families of 30 makers.

fgvc-aircraft-2013b/data/{images, variants.txt, images_variant_train.txt, ...}. The weak labels are the families, or with
data.level = manufacturer the makers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, unknown_split

SPLITS = ("train", "val", "trainval", "test")
LEVELS = {"": "family", "family": "family", "manufacturer": "manufacturer"}
CLASS_FILES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}


def open_split(root: Path | None, split: str, level: str = "") -> FileSet:
    """``root`` holds fgvc-aircraft-2013b, or is it. Raises ConfigError for missing or damaged files."""
    if split not in SPLITS:
        raise unknown_split("aircraft", split, SPLITS)
    if level not in LEVELS:
        raise ConfigError([f"data.level = {level!r} for aircraft: give family or manufacturer"])
    base = first_folder("aircraft", root, "fgvc-aircraft-2013b", "") / "data"
    names, label, classes = _labels(base, "variant", split)
    weak_names, weak, weak_classes = _labels(base, LEVELS[level], split)
    if names != weak_names:
        raise ConfigError([f"{base}: the lists of variants and of {LEVELS[level]} differ for {split}; fetch it again"])
    return FileSet(
        name="aircraft",
        split=split,
        label=label,
        weak=weak,
        classes=classes,
        weak_classes=weak_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / "images",
        files=np.array(names, dtype=np.bytes_),
    )


def _labels(base: Path, kind: str, split: str) -> tuple[list[bytes], NDArray[np.int64], tuple[str, ...]]:
    """Files, labels and classes of one kind of label."""
    classes = tuple(line.strip() for line in files.read_lines(base / CLASS_FILES[kind]))
    number = {name: i for i, name in enumerate(classes)}
    source = base / f"images_{kind}_{split}.txt"
    names, label = [], []
    for i, line in enumerate(files.read_lines(source), start=1):
        image, name = [*line.strip().split(" ", 1), ""][:2]
        if name not in number:
            raise ConfigError(
                [f"{source}: line {i} has the {kind} {name!r}, not in {CLASS_FILES[kind]}; fetch it again"]
            )
        names.append(files.below(f"{image}.jpg", base / "images", f"{source}: line {i}"))
        label.append(number[name])
    return names, np.array(label, dtype=np.int64), classes
