"""imagenet: ILSVRC-2012, 1.28 million photographs of 1000 classes, in folders train and val, with MaskCon's 12 coarse classes.

Each folder has a folder per class, named by its wnid (n01440764, ...); the labels are in the order of the wnids.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from raycon.core.config import ConfigError

from .. import coarse
from . import FileSet, image_folder, unknown_split

REMOTE = True
CLASSES = 1000


def open_split(root: Path | str | None, split: str) -> FileSet:
    """Splits train and val (test is another name of val). Raises ConfigError unless there are exactly 1000 classes."""
    found = open_folders("imagenet", root, split, CLASSES, None)
    return dataclasses.replace(
        found, weak=coarse.imagenet()[found.label], weak_classes=tuple(f"coarse {i}" for i in range(12))
    )


def open_folders(
    name: str, root: Path | str | None, split: str, number: int, classes: tuple[str, ...] | None
) -> FileSet:
    """``root``/train or val as class folders: ``classes``, or all of train's, which must be ``number``."""
    if split not in ("train", "val", "test"):
        raise unknown_split(name, split, ("train", "val", "test"))
    if root is None:
        raise ConfigError([f"data.name = {name!r} needs its files: give --data.root, the folder that holds train, val"])
    train = image_folder.split_folder(root, "train")
    folder = train if split == "train" else image_folder.split_folder(root, "val")
    if train == root:
        raise ConfigError([f"data.name = {name!r}: no folder train in data.root = '{root}'; give --data.root FOLDER"])
    there = image_folder.class_names(train)
    if classes is None and len(there) != number:
        raise ConfigError(
            [f"'{train}' has {len(there)} class folders, {name} has {number}: is it complete, and is it {name}?"]
        )
    if missing := [c for c in classes or () if c not in set(there)]:
        raise ConfigError([f"'{train}' has no folder for {', '.join(missing[:8])}: {len(missing)} classes are missing"])
    found = image_folder.read_folder(name, split, folder, classes or there, only=classes is not None)
    if not found.classes:
        raise ConfigError([f"'{folder}' has no class folders: move its images into a folder per class (wnid)"])
    return found
