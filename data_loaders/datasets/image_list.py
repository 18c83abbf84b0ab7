"""image-list: images that a text file lists, one a line: `path label`, or what data.columns says (label path; path; ...).

data.listing is the file; {split} in it becomes train, val or test, without it there is a train split only. Paths are
below data.root (without one: below the file's folder). Labels are numbers from 0 (-1: none) or names of classes; names
are numbered in sorted order, as in the train split. Roles: path, label, weak.
"""

from __future__ import annotations

from pathlib import Path

from raycon.core.config import ConfigError

from .. import tables
from . import FileSet, unknown_split

REMOTE = True
SPLITS = ("train", "val", "test")


def open_split(
    root: Path | str | None, split: str, listing: str = "", columns: tuple[str, ...] = (), level: str = ""
) -> FileSet:
    """Raises ConfigError for an unknown split and whatever is wrong with the list, naming the line."""
    if split not in (SPLITS if "{split}" in listing else ("train",)):
        raise unknown_split("image-list", split, SPLITS if "{split}" in listing else ("train",))
    if level:
        raise ConfigError(
            [f"data.level = {level!r} has no effect on image-list: weak labels are a column (--data.columns)"]
        )
    roles = columns or ("path", "label")
    if "path" not in roles or len(set(roles)) != len(roles) or not set(roles) <= {"path", "label", "weak"}:
        raise ConfigError(
            [f"data.columns = {' '.join(roles)}: give path, label, weak in the order of the list's columns"]
        )
    file = tables.split_file(listing, split)
    place = root or (file.parent if isinstance(file, Path) else file.rsplit("/", 1)[0])
    listed = tables.collect(tables.text_lines(file, roles), roles, place, (split,))
    train = listed
    if split != "train" and len(roles) > 1:
        source = tables.split_file(listing, "train")
        train = tables.collect(tables.text_lines(source, roles), roles, place, ("train",))
    if not len(listed.files):
        raise ConfigError([f"{file}: lists no images"])
    return tables.build("image-list", split, place, listed, train, level, str(file))
