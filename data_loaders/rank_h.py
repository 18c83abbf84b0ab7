"""Cl-InfoNCE's metadata (arXiv 2106.02869, 2202.06670): meta_data_train.csv and meta_data_val.csv, usually in a folder rank_H.

Columns: an unnamed index, ``path``, ``class``, and in the training table ``label_gran_<g>`` per granularity g. The last
line, of index -1, holds the number of distinct values and is no image. Numbers of classes begin at 0 or 1 and those of
clusters anywhere, so both are numbered anew from 0, in ascending order; classes of both splits as in the training table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError
from raycon.index.metadata import read_table

from . import files
from .datasets import FileSet, need_root, no_labels, unknown_split

TABLES = {"train": "meta_data_train.csv", "val": "meta_data_val.csv", "test": "meta_data_val.csv"}
GRANULARITY = "label_gran_"


def folder_of(root: Path, listing: str) -> Path | None:
    """Where the tables are: ``listing``, else ``root``/rank_H or ``root``; None when they are in neither."""
    places = [Path(listing).expanduser().absolute()] if listing else [root / "rank_H", root]
    found = next((place for place in places if (place / TABLES["train"]).is_file()), None)
    if listing and found is None:
        raise ConfigError([f"data.listing = {listing!r}: no {TABLES['train']} in it; give the folder of the tables"])
    return found


def open_tables(
    name: str,
    root: Path | None,
    split: str,
    listing: str,
    level: str,
    *,
    places: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> FileSet:
    """The images of a table, in its order. ``places``: where below ``root`` the paths may begin.

    level: "" no weak labels; a granularity, its clusters; "0" the classes; "-1" every image its own. Only the training
    table has clusters. Raises ConfigError for unknown splits and levels, and what is missing or wrong in the tables.
    """
    if split not in TABLES:
        raise unknown_split(name, split, tuple(TABLES))
    root = need_root(name, root, f"the images and rank_H ({', '.join(sorted(set(TABLES.values())))})")
    folder = folder_of(root, listing)
    if folder is None:
        raise ConfigError(
            [f"data.name = {name!r}: no rank_H/{TABLES['train']} in '{root}'; give its folder as data.listing"]
        )
    file = folder / TABLES[split]
    header, cells = _read(file)
    paths = cells[:, header.index("path")]
    base, encoded = _images(root, places, paths, file)
    train_header, train_cells = (header, cells) if split == "train" else _read(folder / TABLES["train"])
    known = _numbers(train_cells[:, train_header.index("class")], folder / TABLES["train"])
    values = np.unique(known)
    own = _numbers(cells[:, header.index("class")], file)
    if foreign := sorted(set(own.tolist()) - set(values.tolist())):
        raise ConfigError([f"{file}: class {foreign[0]} is not in {TABLES['train']}; are the two tables a pair?"])
    label = np.searchsorted(values, own)
    weak = no_labels(len(label))
    if split == "train" or level in ("0", "-1"):
        weak = _weak(level, header, cells, label, file)
    return FileSet(
        name=name,
        split=split,
        label=label,
        weak=weak,
        classes=_class_names(values, own, paths),
        weak_classes=tuple(f"cluster {i}" for i in range(int(weak.max()) + 1)) if level != "-1" else (),
        mean=mean,
        std=std,
        root=base,
        files=encoded,
    )


def _read(file: Path) -> tuple[list[str], NDArray[np.str_]]:
    try:
        header, cells = read_table(file)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if missing := [column for column in ("path", "class") if column not in header]:
        raise ConfigError([f"{file}: has no column {missing[0]!r}; it has {', '.join(header)}"])
    if not len(cells):
        raise ConfigError([f"{file}: holds no images"])
    return header, cells


def _images(root: Path, places: Sequence[str], paths: NDArray[np.str_], file: Path) -> tuple[Path, NDArray[np.bytes_]]:
    """Where below ``root`` the paths begin, and the paths."""
    encoded = [files.below(str(path), root, f"{file}, image {i}") for i, path in enumerate(paths)]
    bases = [root / place for place in places]
    base = next((b for b in bases if (b / str(paths[0])).exists()), None)
    if base is None:
        looked = " nor in ".join(f"'{b}'" for b in bases)
        raise ConfigError([f"{file}: its first image {str(paths[0])!r} is not in {looked}; give --data.root FOLDER"])
    return base, np.array(encoded, dtype=np.bytes_)


def _numbers(column: NDArray[np.str_], file: Path) -> NDArray[np.int64]:
    try:
        number = column.astype(np.float64)
    except ValueError as error:
        raise ConfigError([f"{file}: a label is not a number ({error})"]) from error
    if not (np.abs(number) < 2**53).all():  # nan too
        raise ConfigError(
            [f"{file}: image {int(np.argmin(np.abs(number) < 2**53))} has a label that is no class; mend it"]
        )
    return number.astype(np.int64)


def _weak(
    level: str, header: list[str], cells: NDArray[np.str_], label: NDArray[np.int64], file: Path
) -> NDArray[np.int64]:
    if level == "":
        return no_labels(len(label))
    if level == "0":
        return label
    if level == "-1":
        return np.arange(len(label))
    if GRANULARITY + level not in header:
        levels = [column[len(GRANULARITY) :] for column in header if column.startswith(GRANULARITY)]
        raise ConfigError([f"data.level = {level!r}: {file} has the levels {', '.join(levels)}, 0 (class), -1 (image)"])
    column = _numbers(cells[:, header.index(GRANULARITY + level)], file)
    return np.unique(column, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _class_names(values: NDArray[np.int64], own: NDArray[np.int64], paths: NDArray[np.str_]) -> tuple[str, ...]:
    """The folders of the images where each class has one of its own, else the table's numbers."""
    names: dict[int, set[str]] = {}
    for number, path in zip(own.tolist(), paths.tolist(), strict=True):
        names.setdefault(number, set()).add(path.rsplit("/", 2)[-2] if "/" in path else "")
    alone = all(len(folders) == 1 for folders in names.values())
    different = len({folder for folders in names.values() for folder in folders}) == len(values)
    if alone and different and len(names) == len(values):
        return tuple(next(iter(names[int(v)])) for v in values)
    return tuple(f"class {v}" for v in values)
