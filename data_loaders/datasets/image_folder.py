"""image-folder: a folder of class folders of images (ImageNet's layout), or one flat folder without classes.

With sub-folders ``train`` and ``val`` or ``test`` the split's folder is read (split ``test`` takes either), else
``root`` itself is the train split. Classes and files are in sorted order (of bytes, so the same on every machine); the
classes of all splits are those of ``train``. Images may lie deeper inside a class folder. Hidden files are left out,
and files without an image's ending (.jpg .jpeg .png .webp .bmp .ppm .pgm .tif .tiff).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, no_labels, unknown_split

log = logging.getLogger(__name__)

REMOTE = True
SPLITS = {"train": ("train",), "val": ("val",), "test": ("test", "val")}


def open_split(root: Path | str | None, split: str) -> FileSet:
    """Files are listed, not opened: an unreadable image is named when it is read. An empty class is warned about.

    Raises ConfigError for a missing or empty folder, class folders beside loose images, classes that the train split
    does not have, and an unknown split.
    """
    if split not in SPLITS:
        raise unknown_split("image-folder", split, tuple(SPLITS))
    if root is None:
        raise ConfigError(["data.name = 'image-folder' needs to know which folder: give --data.root FOLDER"])
    if not files.is_folder(root):
        raise ConfigError([f"data.root = '{root}' is not a folder: give the folder that holds the images"])
    folder = split_folder(root, split)
    train = folder if split == "train" else split_folder(root, "train")
    return read_folder("image-folder", split, folder, class_names(train) if train != folder else None)


def split_folder(root: Path | str, split: str) -> Path | str:
    """The folder of a split. Raises ConfigError when there is none."""
    for name in SPLITS[split]:
        if files.is_folder(files.inside(root, name)):
            return files.inside(root, name)
    if split != "train":
        raise ConfigError([f"data.root = '{root}' has no folder {' or '.join(SPLITS[split])} for the {split} split"])
    return root


def class_names(folder: Path | str) -> tuple[str, ...]:
    """The sub-folders of a local folder or address, sorted; () for a flat folder."""
    if isinstance(folder, Path):
        with os.scandir(os.fsencode(folder)) as entries:
            found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(b"."))
        return tuple(os.fsdecode(name) for name in found)
    return tuple(group.name.decode() for group in files.groups(folder) if group.name)


def read_folder(
    name: str, split: str, folder: Path | str, classes: tuple[str, ...] | None = None, only: bool = False
) -> FileSet:
    """The images of ``folder`` with their class folders as labels; ``classes``: which, in the order of their labels.

    only: leave other class folders out, rather than refuse them. Raises ConfigError, see ``open_split``.
    """
    groups = files.groups(folder)
    loose = [group for group in groups if not group.name]
    if loose and any(len(group.files) for group in groups if group.name):
        raise ConfigError([f"'{folder}' has images both beside and inside class folders: move the loose ones away"])
    names = () if loose else tuple(os.fsdecode(group.name) for group in groups)
    order = names if classes is None else classes
    if classes is not None and not loose:
        known = set(classes)
        if not only and (foreign := [name for name in names if name not in known]):
            raise ConfigError(
                [f"'{folder}': classes that the train split does not have: {', '.join(foreign[:8])}; remove them"]
            )
        groups = [group for group in groups if os.fsdecode(group.name) in known]
    groups = loose or groups
    if not any(len(group.files) for group in groups):
        raise ConfigError([f"'{folder}' holds no images ({', '.join(e.decode() for e in files.ENDINGS)})"])
    paths, size = files.join(groups)
    if loose:
        label, order = no_labels(len(paths)), ()
    else:
        number = {name: i for i, name in enumerate(order)}
        of_group = [number[os.fsdecode(group.name)] for group in groups]
        label = np.repeat(np.array(of_group, dtype=np.int64), [len(group.files) for group in groups])
        by_label = np.argsort(label, kind="stable")  # groups come sorted by name, ``classes`` may not be
        if (np.diff(by_label) < 0).any():
            label, paths = label[by_label], paths[by_label]
            size = None if size is None else size[by_label]
        empty = np.flatnonzero(np.bincount(label, minlength=len(order)) == 0)
        if len(empty):
            log.warning(
                "'%s': %d of %d classes have no images: %s",
                folder, len(empty), len(order), ", ".join(order[i] for i in empty[:8]),
            )  # fmt: skip
    return FileSet(
        name=name,
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=order,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=folder,
        files=paths,
        file_bytes=size,
    )
