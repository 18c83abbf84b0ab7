"""voc2007: PASCAL VOC 2007, 9,963 photographs with 20 kinds of object (Everingham et al.), several to an image.

VOCdevkit/VOC2007/{JPEGImages, Annotations, ImageSets/Main/<class>_<split>.txt}, lines ``image 1``, ``-1`` or ``0``
(difficult). ``targets`` (N, 20) holds these numbers as they are: who trains SVMs as PCL does takes 0 for -1, the
devkit's measure leaves the image out. ``label`` is the class of an image that has only one, else -1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, no_labels, only_label, unknown_split

SPLITS = ("train", "val", "trainval", "test")
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds VOCdevkit/VOC2007 or VOC2007, or is the latter. Raises ConfigError for missing or damaged files."""
    if split not in SPLITS:
        raise unknown_split("voc2007", split, SPLITS)
    base = first_folder("voc2007", root, "VOCdevkit/VOC2007", "VOC2007", "")
    names: list[str] = []
    targets = []
    for name in CLASSES:
        source = base / "ImageSets" / "Main" / f"{name}_{split}.txt"
        lines = [line.split() for line in files.read_lines(source)]
        for i, line in enumerate(lines, start=1):
            if len(line) != 2 or line[1] not in ("1", "-1", "0"):
                raise ConfigError([f"{source}: line {i} is not an image and 1, -1 or 0; fetch it again"])
        names = names or [line[0] for line in lines]
        if names != [line[0] for line in lines]:
            raise ConfigError([f"{source}: lists other images than {CLASSES[0]}_{split}.txt; fetch it again"])
        targets.append([int(line[1]) for line in lines])
    target = np.array(targets, dtype=np.int8).T.copy()
    images = base / "JPEGImages"
    return FileSet(
        name="voc2007",
        split=split,
        label=only_label(target),
        weak=no_labels(len(names)),
        classes=CLASSES,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        targets=target,
        annotations=str(base / "Annotations"),
        root=images,
        files=np.array([files.below(f"{name}.jpg", images, split) for name in names], dtype=np.bytes_),
    )
