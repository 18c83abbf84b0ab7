"""dtd: Describable Textures, 5,640 pictures of 47 textures (Cimpoi et al. 2014), in the first of its ten published partitions.

dtd/{images/<class>/*.jpg, labels/train1.txt, labels/val1.txt, labels/test1.txt}.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, image_folder, no_labels, unknown_split

SPLITS = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds dtd, or is it; trainval is train, then val. Raises ConfigError for missing or damaged files."""
    if split not in SPLITS:
        raise unknown_split("dtd", split, tuple(SPLITS))
    base = first_folder("dtd", root, "dtd/dtd", "dtd", "")
    images = first_folder("dtd", base, "images")
    classes = image_folder.class_names(images)
    names = []
    for part in SPLITS[split]:
        source = base / "labels" / f"{part}1.txt"
        lines = files.read_lines(source)
        names += [files.below(line.strip(), images, f"{source}: line {i}") for i, line in enumerate(lines, start=1)]
    label = files.folder_labels(names, classes, str(base / "labels"))
    return FileSet(
        name="dtd",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=images,
        files=np.array(names, dtype=np.bytes_),
    )
