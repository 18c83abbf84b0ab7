"""tiny-imagenet: 110,000 labelled ImageNet pictures of 64x64 in 200 classes (Stanford CS231n), as the archive lays them out.

tiny-imagenet-200/{wnids.txt, words.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt}. The
classes are in the order of their wnids. The archive's own test folder has no labels: split test is another name of val.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, image_folder, no_labels, unknown_split


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds tiny-imagenet-200, or is it. Raises ConfigError for missing or damaged files."""
    if split not in ("train", "val", "test"):
        raise unknown_split("tiny-imagenet", split, ("train", "val", "test"))
    base = first_folder("tiny-imagenet", root, "tiny-imagenet-200", "")
    classes = tuple(sorted(line.strip() for line in files.read_lines(base / "wnids.txt")))
    if split == "train":
        found = image_folder.read_folder("tiny-imagenet", split, base / "train", classes)
        return dataclasses.replace(found, classes=_words(base, classes))
    number = {name: i for i, name in enumerate(classes)}
    source = base / "val" / "val_annotations.txt"
    names, label = [], []
    for i, line in enumerate(files.read_lines(source), start=1):
        name, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in number:
            raise ConfigError([f"{source}: line {i} has the class {wnid!r}, which wnids.txt has not; fetch it again"])
        names.append(files.below(name, base / "val" / "images", f"{source}: line {i}"))
        label.append(number[wnid])
    return FileSet(
        name="tiny-imagenet",
        split=split,
        label=np.array(label, dtype=np.int64),
        weak=no_labels(len(label)),
        classes=_words(base, classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / "val" / "images",
        files=np.array(names, dtype=np.bytes_),
    )


def _words(base: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes' words where words.txt has them, else the wnids."""
    if not (base / "words.txt").is_file():
        return classes
    words = dict([*line.split("\t", 1), ""][:2] for line in files.read_lines(base / "words.txt"))
    return tuple(words.get(wnid, wnid).split(",")[0] for wnid in classes)
