"""cub200: Caltech-UCSD Birds, 11,788 photographs of 200 kinds (Wah et al. 2011), with 312 attributes.

Files as they come: CUB_200_2011/{images, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt,
attributes/image_attribute_labels.txt, attributes/attributes.txt or ../attributes.txt}. Where Cl-InfoNCE's rank_H lies
beside images (or is given as data.listing) its tables are read instead.

data.level: "" no weak labels; g the clusters of its g attributes of highest entropy: those of rank_H, else made here
the same way from image_attribute_labels.txt (the authors' own script is not published); "0" the classes; "-1" images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError
from raycon.index import metadata

from .. import files, rank_h
from . import FileSet, check_labels, first_folder, no_labels, unknown_split

MEAN, STD = (0.4863, 0.4999, 0.4312), (0.2070, 0.2018, 0.2428)
CLASSES = 200
ATTRIBUTES = 312


def open_split(root: Path | None, split: str, listing: str = "", level: str = "") -> FileSet:
    """Splits train and test (with rank_H also val, the same). Raises ConfigError for missing or damaged files."""
    base = first_folder("cub200", root, "CUB_200_2011", "")
    tables = listing or next((str(f) for b in (base, base.parent) if (f := rank_h.folder_of(b, ""))), "")
    if tables:
        return rank_h.open_tables("cub200", base, split, tables, level, places=("images", ""), mean=MEAN, std=STD)
    if split not in ("train", "test"):
        raise unknown_split("cub200", split, ("train", "test"))
    names = _column(base / "images.txt")
    label = _numbers(base / "image_class_labels.txt", len(names)) - 1
    check_labels(label, CLASSES, base / "image_class_labels.txt (minus 1)")
    is_train = _numbers(base / "train_test_split.txt", len(names)) == 1
    rows = np.flatnonzero(is_train == (split == "train"))
    attributes, attribute_names = _attributes(base, len(names))
    weak = no_labels(len(names))
    if level == "0":
        weak = label
    elif level == "-1":
        weak[rows] = np.arange(len(rows))
    elif level:
        if attributes is None or not level.isdigit() or not 1 <= int(level) <= ATTRIBUTES:
            where = f"no {base}/attributes/image_attribute_labels.txt" if attributes is None else f"1..{ATTRIBUTES}"
            raise ConfigError([f"data.level = {level!r} for cub200: {where}; or 0 (class), -1 (image), empty (none)"])
        weak[rows] = metadata.attribute_clusters(attributes[rows], int(level))
    images = "images"
    return FileSet(
        name="cub200",
        split=split,
        label=label[rows],
        weak=weak[rows],
        classes=tuple(_column(base / "classes.txt")),
        mean=MEAN,
        std=STD,
        attributes=None if attributes is None else attributes[rows],
        attribute_names=attribute_names,
        root=base / images,
        files=np.array([files.below(names[r], base / images, str(base / "images.txt")) for r in rows], dtype=np.bytes_),
    )


def _column(file: Path) -> list[str]:
    """The second column of lines ``number text``, whose numbers count from 1."""
    lines = [line.split(None, 1) for line in files.read_lines(file)]
    for i, line in enumerate(lines, start=1):
        if len(line) != 2 or line[0] != str(i):
            raise ConfigError([f"{file}: line {i} is not {i} and a text; fetch it again"])
    return [text.strip() for _, text in lines]


def _numbers(file: Path, rows: int) -> NDArray[np.int64]:
    column = _column(file)
    if len(column) != rows or not all(text.isdigit() for text in column):
        raise ConfigError([f"{file}: not a number for each of the {rows} images; fetch it again"])
    return np.array(column, dtype=np.int64)


def _attributes(base: Path, rows: int) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """(rows, 312) of 0 and 1, and the attributes' names; None without the file.

    Lines ``image attribute present certainty time``, some with a column too many.
    """
    file = base / "attributes" / "image_attribute_labels.txt"
    if not file.is_file():
        return None, ()
    table = np.full((rows, ATTRIBUTES), -1, dtype=np.int64)
    with file.open(encoding="utf-8") as handle:
        for i, line in enumerate(handle, start=1):
            try:
                image, attribute, present = (int(part) for part in line.split(None, 3)[:3])
                table[image - 1, attribute - 1] = present
            except (ValueError, IndexError):
                raise ConfigError([f"{file}: line {i} is not `image attribute present ...`; fetch it again"]) from None
    if (table < 0).any():
        raise ConfigError([f"{file}: image {int(np.argwhere(table < 0)[0, 0]) + 1} lacks attributes; fetch it again"])
    places = (base / "attributes" / "attributes.txt", base / "attributes.txt", base.parent / "attributes.txt")
    names = next((place for place in places if place.is_file()), None)
    return table, tuple(_column(names)) if names else tuple(f"attribute {i + 1}" for i in range(ATTRIBUTES))
