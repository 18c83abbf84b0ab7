"""food101: Food-101, 101,000 photographs of 101 dishes (Bossard et al. 2014): food-101/{meta/train.json, meta/test.json, images}."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, no_labels, unknown_split


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds food-101, or is it. Raises ConfigError for missing or damaged files."""
    if split not in ("train", "test"):
        raise unknown_split("food101", split, ("train", "test"))
    base = first_folder("food101", root, "food-101", "")
    source = base / "meta" / f"{split}.json"
    try:
        found = {str(k): [str(name) for name in v] for k, v in json.loads(files.read_bytes(source)).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError([f"{source}: not an object of lists ({error}); fetch it again"]) from error
    classes = sorted(found)
    names = [files.below(f"{n}.jpg", base / "images", str(source)) for members in found.values() for n in members]
    label = np.repeat([classes.index(c) for c in found], [len(members) for members in found.values()]).astype(np.int64)
    return FileSet(
        name="food101",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=tuple(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / "images",
        files=np.array(names, dtype=np.bytes_),
    )
