"""wider-attribute: WIDER Attribute, 13,789 photographs of people in 30 kinds of scene (Li et al. 2016), with Cl-InfoNCE's attribute clusters.

``root`` holds the folders train, val and test of images (or Image with these) and Cl-InfoNCE's rank_H, whose training
table covers train and val, and whose other table is of test. data.level: "" no weak labels; g = 1..14 the clusters of
its g attributes of highest entropy; "0" the scenes; "-1" every image its own.
"""

from __future__ import annotations

from pathlib import Path

from .. import rank_h
from . import FileSet

PLACES = ("", "Image", "images")


def open_split(root: Path | None, split: str, listing: str = "", level: str = "") -> FileSet:
    """Splits train and val (test is another name of val). Raises ConfigError for missing or damaged files."""
    return rank_h.open_tables(
        "wider-attribute", root, split, listing, level,
        places=PLACES, mean=(0.4772, 0.4405, 0.4100), std=(0.2960, 0.2876, 0.2935),
    )  # fmt: skip
