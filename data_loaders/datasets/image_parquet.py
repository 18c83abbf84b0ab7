"""image-parquet: images inside Parquet files (a column of bytes, or of {bytes, path} as Hugging Face's data sets have it).

data.root is the folder of the files, or an address; data.listing a pattern below it with {split} for the split's name.
Without it: SPLIT/*.parquet or SPLIT-*.parquet; for train also files of no split. data.columns says which column is what,
ROLE=COLUMN: image (image, img, jpg, bytes), label (label), weak (weak): in brackets what is taken without it. Names of
classes are taken from the file's own description where it has one.

A row of a Parquet file cannot be read without all of its row group, so the images are copied once, as they are, into
tar archives in data.cache, where every row is one small read.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raycon.core.config import ConfigError

from .. import files, shards
from . import FileSet, need_root

REMOTE = True
USUAL = {"image": ("image", "img", "jpg", "bytes"), "label": ("label",), "weak": ("weak",)}
_AT_ONCE = 64
"""Rows in memory."""


def open_split(
    root: Path | str | None, split: str, listing: str = "", columns: tuple[str, ...] = (), cache: Path = Path()
) -> FileSet:
    """cache: where the images are copied to. Raises ConfigError naming what is wrong with a file, or when the disk has too
    little room."""
    place = root if isinstance(root, str) else need_root("image-parquet", root, "the files")
    given = shards.roles_of(columns, tuple(USUAL))
    roles: dict[str, str] = {}
    names: dict[str, tuple[str, ...]] = {}

    def archive(one: shards.Found) -> Path:
        return _archive(cache, one, roles)

    def opened(split: str) -> tuple[list[shards.Found], list[shards.Index]]:
        found = shards.find("image-parquet", place, split, listing, ".parquet")
        if not roles:
            roles.update(_roles(found[0].file, given))
            names.update(_class_names(found[0].file, roles))
        _check_room(found, roles, cache)
        return found, shards.indexes(found, roles, cache, lambda one: _index(one, roles, cache), archive)

    mine = opened(split)
    labelled = any(index.texts for index in mine[1])
    train = opened("train") if split != "train" and labelled else mine
    return shards.build("image-parquet", split, place, *mine, train, [archive(one) for one in mine[0]], names)


def _archive(cache: Path, one: shards.Found, roles: dict[str, str]) -> Path:
    return shards.kept(cache, one, {"image": roles["image"]}).with_suffix(".tar")  # whatever the labels


def _open(file: str) -> Any:
    """A ParquetFile. Raises ConfigError, also without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError([f"{file}: Parquet needs pyarrow; pip install pyarrow"]) from None
    try:
        return pyarrow.parquet.ParquetFile(files.file_system(file).open(file, "rb") if files.is_remote(file) else file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError([f"{file}: not a Parquet file ({error}); fetch it again"]) from error


def _roles(file: str, given: dict[str, str]) -> dict[str, str]:
    """The column of each role. Raises ConfigError for one that is not there."""
    with _open(file) as table:
        there = table.schema_arrow.names
    roles = {role: next((name for name in usual if name in there), "") for role, usual in USUAL.items()} | given
    roles = {role: name for role, name in roles.items() if name}
    if missing := [f"{role}={name}" for role, name in roles.items() if name not in there] + ["image"] * (
        "image" not in roles
    ):
        raise ConfigError(
            [f"{file}: no column for {missing[0]}; it has {', '.join(there)}: name them, --data.columns image=COLUMN"]
        )
    return roles


def _class_names(file: str, roles: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """By role the names of classes that Hugging Face's description of the columns has."""
    with _open(file) as table:
        described = (table.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    found = {}
    try:
        features = json.loads(described)["info"]["features"]
        for role in ("label", "weak"):
            names = features.get(roles.get(role, ""), {}).get("names")
            if isinstance(names, list) and names:
                found[role] = tuple(map(str, names))
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return found


def _check_room(found: list[shards.Found], roles: dict[str, str], cache: Path) -> None:
    """Raises ConfigError when what is still to be copied does not fit onto the disk."""
    needed = 0
    for one in found:
        if not _archive(cache, one, roles).exists():
            with _open(one.file) as table:
                meta = table.metadata
                for group in range(meta.num_row_groups):
                    parts = [meta.row_group(group).column(i) for i in range(meta.num_columns)]
                    image = [part for part in parts if part.path_in_schema.split(".")[0] == roles["image"]]
                    needed += sum(part.total_uncompressed_size for part in image)
    if not needed:
        return
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed * 1.05 > free:
        raise ConfigError(
            [
                f"data.cache = '{cache}': the images of {found[0].file} and others need {needed / 1e9:.1f} GB there, "
                f"{free / 1e9:.1f} GB are free; give a folder with room in it"
            ]
        )


def _index(one: shards.Found, roles: dict[str, str], cache: Path) -> shards.Index:
    """Where each row's image is in the archive, which is written if it is not there, and the row's labels."""
    target = _archive(cache, one, roles)
    if not target.exists():
        _copy(one.file, roles["image"], target)
    there = shards.scan_tar(shards.Found(str(target), target.name, 0, ""), {})
    columns = {role: name for role, name in roles.items() if role != "image"}
    texts: dict[str, list[bytes]] = {role: [] for role in columns}
    for batch in _batches(one.file, list(columns.values())) if columns else ():
        for role, name in columns.items():
            values = batch.column(name).to_pylist()
            if None in values:
                row = len(texts[role]) + values.index(None)
                raise ConfigError([f"{one.file}: row {row} has no {role}; mend it, or leave the role out"])
            texts[role] += [str(value).strip().encode() for value in values]
    rows = [len(values) for values in texts.values()]
    if any(number != len(there.name) for number in rows):
        raise ConfigError([f"{target}: has {len(there.name)} images, {one.file} {rows[0]} rows; remove {target}"])
    found = {role: np.array(values, dtype=np.bytes_) for role, values in texts.items()}
    return there._replace(name=np.arange(len(there.name)).astype(np.bytes_), texts=found)


def _copy(file: str, column: str, target: Path) -> None:
    """A file's images into an archive: under another name first, read again and compared, then renamed."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    written = []
    try:
        with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
            for row, data in enumerate(_images(file, column)):
                ending = "png" if data.startswith(b"\x89PNG") else "jpg"
                member = tarfile.TarInfo(f"{row:09}.{ending}")
                member.size = len(data)
                written.append((tar.offset + tarfile.BLOCKSIZE, len(data), zlib.crc32(data)))  # type: ignore[attr-defined]
                tar.addfile(member, io.BytesIO(data))
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
        if not written:
            raise ConfigError([f"{file}: holds no rows"])
        with part.open("rb") as copy:
            for row, (start, size, wanted) in enumerate(written):
                copy.seek(start)
                if zlib.crc32(copy.read(size)) != wanted:
                    raise OSError(f"row {row} of {file} was not written correctly")
            os.fsync(copy.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _images(file: str, column: str) -> Iterator[bytes]:
    """Raises ConfigError for a column of something else and for a row without an image."""
    import pyarrow

    row = 0
    for batch in _batches(file, [column]):
        image = batch.column(column)
        if pyarrow.types.is_struct(image.type):
            inside = [image.type.field(i).name for i in range(image.type.num_fields)]
            image = image.field("bytes") if "bytes" in inside else image
        if not (pyarrow.types.is_binary(image.type) or pyarrow.types.is_large_binary(image.type)):
            raise ConfigError(
                [
                    f"{file}: column {column!r} holds {image.type}, not the bytes of images; a table of paths is read with "
                    "data.name = image-table"
                ]
            )
        for data in image.to_pylist():
            if data is None:
                raise ConfigError([f"{file}: row {row} has no image; mend it"])
            yield data
            row += 1


def _batches(file: str, columns: list[str]) -> Iterator[Any]:
    """Few rows at a time. Raises ConfigError naming a file that cannot be read."""
    import pyarrow

    with _open(file) as table:
        try:
            yield from table.iter_batches(batch_size=_AT_ONCE, columns=columns)
        except (OSError, pyarrow.ArrowException, KeyError) as error:
            raise ConfigError([f"{file}: cannot be read to its end ({error}); fetch it again"]) from error
