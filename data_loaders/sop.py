"""MaskCon's two splits of Stanford Online Products (Song et al. 2016): 12 kinds of product are the coarse classes.

``sop_classes.csv`` has a line per product with at least 8 images, in the published order: its part in split 1, its kind,
its number, how many images, and for split 2 the two that are tested.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np

from raycon.core.config import ConfigError

from .datasets import IMAGENET_MEAN, IMAGENET_STD, FileSet, unknown_split

KINDS = (
    "bicycle", "cabinet", "chair", "coffee_maker", "fan", "kettle", "lamp", "mug", "sofa", "stapler", "table", "toaster",
)  # fmt: skip


def listing(number: Literal[1, 2], split: str) -> tuple[list[str], list[int], list[int]]:
    """Paths below the root, coarse and fine labels; fine labels count from 0 in each split of split 1."""
    paths: list[str] = []
    coarse: list[int] = []
    fine: list[int] = []
    classes = 0
    with (Path(__file__).parent / "sop_classes.csv").open(encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            suffixes = sorted(map(str, range(int(line["n_images"]))))  # 0, 1, 10, 11, 2, ...
            if number == 1:
                if line["split1"] != split:
                    continue
            elif not line["split2_test_suffixes"]:
                continue
            else:
                tested = set(line["split2_test_suffixes"].split())
                suffixes = [s for s in suffixes if (s in tested) == (split == "test")]
            kind = int(line["coarse"])
            paths += [f"{KINDS[kind]}_final/{line['product_id']}_{suffix}.JPG" for suffix in suffixes]
            coarse += [kind] * len(suffixes)
            fine += [classes] * len(suffixes)
            classes += 1
    return paths, coarse, fine


def open_number(number: Literal[1, 2], root: Path | None, split: str) -> FileSet:
    """Raises ConfigError for an unknown split and without the folder of images."""
    name = f"sop-split{number}"
    if split not in ("train", "test"):
        raise unknown_split(name, split, ("train", "test"))
    if root is None or not (root / f"{KINDS[0]}_final").is_dir():
        where = "" if root is None else f" (no {KINDS[0]}_final in {root})"
        raise ConfigError([f"data.name = {name!r}: give --data.root, the folder of Stanford_Online_Products{where}"])
    paths, coarse, fine = listing(number, split)
    return FileSet(
        name=name,
        split=split,
        label=np.array(fine, dtype=np.int64),
        weak=np.array(coarse, dtype=np.int64),
        classes=tuple(f"product {i}" for i in range(max(fine) + 1)),
        weak_classes=KINDS,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=root,
        files=np.array([p.encode() for p in paths], dtype=np.bytes_),
    )
