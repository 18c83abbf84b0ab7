"""sun397: SUN397, 108,754 photographs of 397 kinds of scene (Xiao et al. 2010), in the first of its ten published partitions.

SUN397/{ClassName.txt, a/abbey/sun_*.jpg, ...} and Training_01.txt, Testing_01.txt (19,850 each), which lie in SUN397, in
Partitions beside it or in ``root``. Some files are not JPEG in spite of their name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import files
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, first_folder, no_labels, unknown_split

LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds SUN397, or is it. Raises ConfigError for missing or damaged files."""
    if split not in LISTS:
        raise unknown_split("sun397", split, tuple(LISTS))
    base = first_folder("sun397", root, "SUN397", "")
    places = [base, base / "Partitions", base.parent / "Partitions", base.parent]
    source = next((p / LISTS[split] for p in places if (p / LISTS[split]).is_file()), None)
    if source is None:
        raise ConfigError([f"data.name = 'sun397': no {LISTS[split]} in '{base}' or Partitions; fetch Partitions.zip"])
    listed = next((p / "ClassName.txt" for p in places if (p / "ClassName.txt").is_file()), None)
    if listed is None:
        raise ConfigError([f"data.name = 'sun397': no ClassName.txt in '{base}' or Partitions; fetch it again"])
    classes = [line.strip() for line in files.read_lines(listed)]
    number = {name: i for i, name in enumerate(classes)}
    names, label = [], []
    for i, line in enumerate(files.read_lines(source), start=1):
        path = line.strip()
        folder = path.rsplit("/", 1)[0]
        if folder not in number:
            raise ConfigError([f"{source}: line {i}: {folder!r} is not in {listed.name}; fetch it again"])
        names.append(files.below(path.lstrip("/"), base, f"{source}: line {i}"))
        label.append(number[folder])
    return FileSet(
        name="sun397",
        split=split,
        label=np.array(label, dtype=np.int64),
        weak=no_labels(len(label)),
        classes=tuple(name[3:] for name in classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base,
        files=np.array(names, dtype=np.bytes_),
    )
