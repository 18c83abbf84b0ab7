"""coco2017: COCO 2017, 118,287 photographs to train with and 5,000 to test (Lin et al. 2014), 80 kinds of object.

{train2017, val2017, annotations/instances_train2017.json, annotations/instances_val2017.json}; ``annotations`` of the
data set is that file, for detection. For classification ``targets`` (N, 80) is 1 where an image has an object of the
kind, 0 where it has only a crowd of them, else -1; ``label`` is the kind of an image that has only one, else -1, and
``weak`` its super-category (12). Rows are in the order of the image ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, only_label, unknown_split

SPLITS = {"train": "train2017", "val": "val2017", "test": "val2017"}


def open_split(root: Path | None, split: str) -> FileSet:
    """Test is another name of val: the labels of COCO's own test are not published. Raises ConfigError."""
    if split not in SPLITS:
        raise unknown_split("coco2017", split, tuple(SPLITS))
    base = first_folder("coco2017", root, "coco", "")
    folder = SPLITS[split]
    source = base / "annotations" / f"instances_{folder}.json"
    try:
        found = json.loads(files.read_bytes(source))
        names, target, kinds, over = _read(found, base / folder, source)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{source}: not a file of COCO instances ({error!r}); fetch it again"]) from error
    label = only_label(target)
    supers = tuple(dict.fromkeys(over))
    of_kind = np.array([supers.index(name) for name in over] + [-1], dtype=np.int64)
    return FileSet(
        name="coco2017",
        split=split,
        label=label,
        weak=of_kind[label],
        classes=kinds,
        weak_classes=supers,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        targets=target,
        annotations=str(source),
        root=base / folder,
        files=names,
    )


def _read(
    found: dict[str, Any], folder: Path, source: Path
) -> tuple[NDArray[np.bytes_], NDArray[np.int8], tuple[str, ...], tuple[str, ...]]:
    """Files, targets, names of the categories (by id) and of the super-category of each."""
    images = sorted(found["images"], key=lambda image: int(image["id"]))
    names = [files.below(str(image["file_name"]), folder, f"{source}, image {image['id']}") for image in images]
    kinds = sorted(found["categories"], key=lambda kind: int(kind["id"]))
    row = {image["id"]: i for i, image in enumerate(images)}
    column = {kind["id"]: i for i, kind in enumerate(kinds)}
    target = np.full((len(images), len(kinds)), -1, dtype=np.int8)
    for thing in found["annotations"]:
        if thing["image_id"] not in row or thing["category_id"] not in column:
            raise ConfigError(
                [f"{source}: object {thing.get('id')} is of an unknown image or category; fetch it again"]
            )
        at = row[thing["image_id"]], column[thing["category_id"]]
        target[at] = max(target[at], 0 if thing.get("iscrowd") else 1)
    return (
        np.array(names, dtype=np.bytes_),
        target,
        tuple(str(kind["name"]) for kind in kinds),
        tuple(str(kind.get("supercategory", kind["name"])) for kind in kinds),
    )
