"""stl10: STL-10, 96x96 colour images (Coates, Ng, Lee 2011): 5,000 train, 8,000 test, 100,000 unlabeled.

stl10_binary/{train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin, class_names.txt}: bytes, channel after
channel, each column by column; labels from 1. The images are not loaded but mapped into memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .. import files
from . import ArraySet, check_labels, first_folder, no_labels, unknown_split

SPLITS = ("train", "test", "unlabeled")
BYTES = 3 * 96 * 96


def open_split(root: Path | None, split: str) -> ArraySet:
    """``root`` holds stl10_binary, or is it. Raises ConfigError for missing or damaged files."""
    if split not in SPLITS:
        raise unknown_split("stl10", split, SPLITS)
    base = first_folder("stl10", root, "stl10_binary", "")
    images = _images(base / f"{split}_X.bin")
    label = no_labels(len(images))
    if split != "unlabeled":
        source = base / f"{split}_y.bin"
        label = np.frombuffer(files.read_bytes(source), np.uint8).astype(np.int64) - 1
        if len(label) != len(images):
            raise ConfigError([f"{source}: {len(label)} labels for {len(images)} images; fetch it again"])
        check_labels(label, 10, f"{source} (minus 1)")
    names = base / "class_names.txt"
    return ArraySet(
        name="stl10",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=tuple(files.read_lines(names)) if names.is_file() else tuple(f"class {i}" for i in range(10)),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        images=images,
    )


def _images(file: Path) -> NDArray[np.uint8]:
    """(N, 96, 96, 3), a view of the mapped file."""
    try:
        size = file.stat().st_size
        if size % BYTES or not size:
            raise ConfigError([f"{file}: {size} bytes are no whole number of 3 x 96 x 96 images; fetch it again"])
        return np.memmap(file, np.uint8, mode="r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read ({error.strerror}); fetch it again"]) from error
