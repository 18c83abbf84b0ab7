"""zappos50k: UT-Zappos50K, 50,025 catalogue pictures of shoes (Yu, Grauman 2014), with Cl-InfoNCE's split and attribute clusters.

``root`` holds ut-zap50k-images-square (or ut-zap50k-images) and Cl-InfoNCE's rank_H, which has the split (70 % train)
and the 21 classes. data.level: "" no weak labels; g the clusters of its g attributes of highest entropy (3, 5, 7, 10,
...); "0" the classes; "-1" every image its own.
"""

from __future__ import annotations

from pathlib import Path

from .. import rank_h
from . import FileSet

PLACES = ("ut-zap50k-images-square", "ut-zap50k-images", "images", "")


def open_split(root: Path | None, split: str, listing: str = "", level: str = "") -> FileSet:
    """Splits train and val (test is another name of val). Raises ConfigError for missing or damaged files."""
    return rank_h.open_tables(
        "zappos50k", root, split, listing, level,
        places=PLACES, mean=(0.8342, 0.8142, 0.8081), std=(0.2804, 0.3014, 0.3072),
    )  # fmt: skip
