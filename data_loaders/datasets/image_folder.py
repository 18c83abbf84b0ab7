"""image-folder: a folder of class folders of images (ImageNet's layout), or one flat folder without classes.

With sub-folders ``train`` and ``val`` or ``test`` (split ``test`` takes either) the split's folder is read, else
``root`` itself is the train split. Classes and files are in sorted order (of bytes, so the same on every machine).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, no_labels, unknown_split

ENDINGS = (b".jpg", b".jpeg", b".png")
SPLITS = {"train": ("train",), "test": ("test", "val")}


def open_split(root: Path | None, split: str) -> FileSet:
    """Files are listed, not opened: an unreadable image is named when it is read.

    Raises ConfigError for a missing or empty folder, class folders beside loose images, and an unknown split.
    """
    if split not in SPLITS:
        raise unknown_split("image-folder", split, tuple(SPLITS))
    if root is None:
        raise ConfigError(["data.name = 'image-folder' needs to know which folder: give --data.root FOLDER"])
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None:
        if split != "train":
            raise ConfigError([f"data.root = '{root}' has no folder {' or '.join(SPLITS[split])} for the test split"])
        folder = root
    if not folder.is_dir():
        raise ConfigError([f"data.root = '{root}' is not a folder: give the folder that holds the images"])

    base = os.fsencode(folder)
    loose = _images(base, b"")
    with os.scandir(base) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(b"."))
    per_class = [_images(os.path.join(base, name), name + b"/") for name in classes]
    if loose and any(per_class):
        raise ConfigError([f"'{folder}' has images both beside and inside class folders: move the loose ones away"])
    empty = [os.fsdecode(name) for name, files in zip(classes, per_class, strict=True) if not files]
    class_names: tuple[str, ...] = ()
    if loose:
        files, label = loose, no_labels(len(loose))
    else:
        if not any(per_class):
            raise ConfigError([f"'{folder}' holds no images ({', '.join(e.decode() for e in ENDINGS)})"])
        if empty:
            raise ConfigError([f"'{folder}': class folders without images: {', '.join(empty[:8])}; remove them"])
        files = [file for group in per_class for file in group]
        label = np.repeat(np.arange(len(classes), dtype=np.int64), [len(group) for group in per_class])
        class_names = tuple(os.fsdecode(name) for name in classes)
    return FileSet(
        name="image-folder",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=class_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=folder,
        files=np.array(files, dtype=np.bytes_),
    )


def _images(folder: bytes, prefix: bytes) -> list[bytes]:
    with os.scandir(folder) as entries:
        return sorted(prefix + entry.name for entry in entries if entry.name.lower().endswith(ENDINGS))
