"""pets: Oxford-IIIT Pets, 7,349 photographs of 37 breeds (Parkhi et al. 2012); the weak labels are cat and dog.

oxford-iiit-pet/{images/*.jpg, annotations/trainval.txt, annotations/test.txt}, lines ``image class species breed``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, check_labels, first_folder, unknown_split

SPLITS = {"train": "trainval", "trainval": "trainval", "test": "test"}
CLASSES = 37


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds oxford-iiit-pet, or is it; train is the published trainval. Raises ConfigError."""
    if split not in SPLITS:
        raise unknown_split("pets", split, tuple(SPLITS))
    base = first_folder("pets", root, "oxford-iiit-pet", "")
    source = base / "annotations" / f"{SPLITS[split]}.txt"
    names, numbers = [], []
    breeds = [f"class {i}" for i in range(CLASSES)]
    for i, line in enumerate(files.read_lines(source), start=1):
        if line.startswith("#"):
            continue
        image, *rest = line.split()
        if len(rest) != 3 or not all(part.isdigit() for part in rest):
            raise ConfigError([f"{source}: line {i} is not `image class species breed`; fetch it again"])
        names.append(files.below(f"{image}.jpg", base / "images", f"{source}: line {i}"))
        numbers.append([int(part) - 1 for part in rest[:2]])
        if numbers[-1][0] < CLASSES:
            breeds[numbers[-1][0]] = image.rsplit("_", 1)[0].replace("_", " ")
    label, weak = np.array(numbers, dtype=np.int64).reshape(-1, 2).T
    return FileSet(
        name="pets",
        split=split,
        label=check_labels(np.ascontiguousarray(label), CLASSES, f"{source} (minus 1)"),
        weak=check_labels(np.ascontiguousarray(weak), 2, f"{source}, species (minus 1)"),
        classes=tuple(breeds),
        weak_classes=("cat", "dog"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / "images",
        files=np.array(names, dtype=np.bytes_),
    )
