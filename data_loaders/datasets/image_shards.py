"""image-shards: images in tar archives, many to a file, in webdataset's layout (0001.jpg, 0001.cls, 0002.jpg, ...).

data.root is the folder of the archives, or an address; data.listing a pattern below it, train-{000..146}.tar say, with
{split} for the split's name. Without it: SPLIT/*.tar or SPLIT-*.tar; for train also archives of no split. Archives must
not be compressed: images are read where they lie. data.columns says where labels are, ROLE=EXTENSION (label=cls is the
default), ROLE=EXTENSION:FIELD for JSON (label=json:class), ROLE=folder for the folder in the archive; roles: label, weak,
and image for the extension of the image where a sample has several.
"""

from __future__ import annotations

from pathlib import Path

from .. import shards
from . import FileSet, need_root

REMOTE = True


def open_split(
    root: Path | str | None, split: str, listing: str = "", columns: tuple[str, ...] = (), cache: Path = Path()
) -> FileSet:
    """cache: where it is kept what lies where in the archives. Raises ConfigError naming what is wrong with one."""
    place = root if isinstance(root, str) else need_root("image-shards", root, "the archives")
    roles = shards.roles_of(columns, ("image", "label", "weak"))

    def opened(split: str) -> tuple[list[shards.Found], list[shards.Index]]:
        found = shards.find("image-shards", place, split, listing, ".tar")
        return found, shards.indexes(found, roles, cache, lambda one: shards.scan_tar(one, roles))

    mine = opened(split)
    labelled = any(index.texts for index in mine[1])
    return shards.build("image-shards", split, place, *mine, opened("train") if split != "train" and labelled else mine)
