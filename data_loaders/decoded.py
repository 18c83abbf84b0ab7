"""Images of one size decoded once, into a file in the cache that is mapped rather than read (``data.decode = once``).

The file is a NumPy array (N, H, W, 3) of uint8. It grows under another name in spans with a checksum each, so that a
stopped process goes on where it was, is read again at the end, and only then gets its name, which follows from the
images' paths, sizes and times. Afterwards the data set is one of fixed size: whole images travel to the device, and
nothing is decoded or cropped on the way.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .datasets import FileSet, ImageSet
from .progress import progress
from .write_ffcv import noted

log = logging.getLogger(__name__)

SPAN_BYTES = 32 * 2**20
"""Pixels that are decoded and written at once, about."""
LOOKED_AT = 64
"""Images whose size is looked at before anything is decoded."""
COMPARED = 8
"""Images of a file that was found which are decoded again and compared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedSet(ImageSet):
    """The images of ``source`` as an array that is mapped. Pickled, only its name travels."""

    source: FileSet = field(repr=False)
    file: Path
    at: NDArray[np.int64] = field(repr=False)
    """(N,) place of each row in the file."""
    size: tuple[int, int, int]
    """H, W, C."""

    @property
    def image(self) -> tuple[int, int, int]:
        height, width, channels = self.size
        return channels, height, width

    @property
    def _images(self) -> NDArray[np.uint8]:
        if (images := self.__dict__.get("_mapped")) is None:
            try:
                images = np.load(self.file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.file}: cannot be read ({error}); data.cache must be a folder that every node sees"
                ) from error
            self.__dict__["_mapped"] = images
        return images  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def block(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.take(self._images, self.at[rows], axis=0)

    def read(self, row: int) -> NDArray[np.uint8]:
        return self._images[self.at[row]]

    def path(self, row: int) -> Path | None:
        return self.source.path(row)

    def where(self, row: int) -> str:
        return self.source.where(row)

    def subset(self, rows: NDArray[np.int64], **changed: Any) -> DecodedSet:
        return super().subset(rows, at=self.at[rows], source=self.source.subset(rows), **changed)

    def _content(self) -> bytes:
        return self.source._content() + b"decoded"


def decode_once(dataset: ImageSet, cache: Path) -> ImageSet:
    """``dataset`` with its images decoded, those that have files; processes that ask together wait for the first.

    Raises ConfigError when the images are not of one size, the disk has too little room or cannot be written, and
    ValueError naming an unreadable image.
    """
    from .common import file_lock

    if not isinstance(dataset, FileSet):
        log.warning("data.decode = once has no effect: the images of %s are in memory", dataset.name)
        return dataset
    size = _one_size(dataset)
    file = cache / f"{dataset.fingerprint}.decoded.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock(cache / f"{dataset.fingerprint}.decoded.lock"):
            problem = _problem(file, dataset, size) if file.exists() else "is not there yet"
            if problem:
                log.info("%s %s: decoding %d images", file, problem, len(dataset))
                _write(dataset, size, file)
    except OSError as error:
        raise ConfigError([f"data.cache: cannot write {file} ({error}); give a folder with room in it"]) from error
    shared = {name: getattr(dataset, name) for name in ImageSet.__dataclass_fields__}
    return DecodedSet(**shared, source=dataset, file=file, at=np.arange(len(dataset)), size=size)


def _one_size(dataset: FileSet) -> tuple[int, int, int]:
    """(H, W, 3) of the first image. Raises ConfigError when one of some others has another size."""
    from .photos import Photo, size_of

    rows = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(np.int64)).tolist()
    found = dataset.encoded_many(rows)
    sizes = [
        size_of(Photo(np.frombuffer(data, np.uint8), dataset.where(row))) for row, data in zip(rows, found, strict=True)
    ]
    for row, (height, width) in zip(rows, sizes, strict=True):
        if (height, width) != sizes[0]:
            raise _other_size(dataset, row, (height, width), sizes[0])
    return (*sizes[0], 3)


def _other_size(dataset: FileSet, row: int, size: tuple[int, int], first: tuple[int, int]) -> ConfigError:
    return ConfigError(
        [
            f"data.decode = 'once': {dataset.where(row)} has {size[1]} x {size[0]} pixels, {dataset.where(0)} "
            f"{first[1]} x {first[0]}: only images of one size can be kept decoded; resize them, or leave data.decode = "
            "'always'"
        ]
    )


def _problem(file: Path, dataset: FileSet, size: tuple[int, int, int]) -> str:
    """What keeps the file from being this data set's; empty when it is."""
    try:
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return f"cannot be read ({error})"
    if images.dtype != np.uint8 or images.shape != (len(dataset), *size):
        return f"holds {images.dtype} {images.shape}"
    for row in np.unique(np.linspace(0, len(dataset) - 1, COMPARED).astype(np.int64)).tolist():
        if not np.array_equal(images[row], dataset.read(row)):
            return f"its image {row} differs"
    return ""


def _write(dataset: FileSet, size: tuple[int, int, int], file: Path) -> None:
    part, journal = (file.with_name(f".{file.name}.{ending}") for ending in ("part", "part.jsonl"))
    bytes_each, rows = int(np.prod(size)), len(dataset)
    there = part.stat().st_blocks * 512 if part.exists() else 0
    needed, free = bytes_each * rows - there, shutil.disk_usage(file.parent).free
    if needed * 1.02 > free:
        raise ConfigError(
            [
                f"data.decode = 'once': {rows:,} images of {size[1]} x {size[0]} pixels need {needed / 1e9:.1f} GB more in "
                f"data.cache = '{file.parent}', {free / 1e9:.1f} GB are free; give another folder, or leave it 'always'"
            ]
        )
    try:
        _write_spans(dataset, (rows, *size), part, journal)
    except ValueError:  # would come again; what a killed process leaves is gone on with
        part.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        raise
    os.replace(part, file)
    journal.unlink(missing_ok=True)


def _write_spans(dataset: FileSet, shape: tuple[int, int, int, int], part: Path, journal: Path) -> None:
    """Decode what is not in the file yet, then read all of it again. Raises ValueError naming an image, OSError."""
    head = {"data": dataset.fingerprint, "shape": list(shape)}
    sums = noted(journal, head) if part.exists() else {}
    if not sums:
        with part.open("wb") as new:
            np.lib.format.write_array_header_1_0(new, {"descr": "|u1", "fortran_order": False, "shape": shape})
        journal.write_text(json.dumps(head) + "\n", encoding="utf-8")
    rows, each = shape[0], int(np.prod(shape[1:]))
    step = max(1, SPAN_BYTES // each)

    def one(row: int) -> NDArray[np.uint8]:
        pixels = dataset.read(row)
        if pixels.shape != shape[1:]:
            raise _other_size(dataset, row, pixels.shape[:2], shape[1:3])
        return pixels

    with (
        part.open("r+b") as out,
        journal.open("a", encoding="utf-8") as notes,
        progress("images decoded", rows) as tell,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        np.lib.format.read_magic(out)
        np.lib.format.read_array_header_1_0(out)
        begin = out.tell()
        for first in range(0, rows, step):
            if first not in sums:
                data = b"".join(pixels.tobytes() for pixels in pool.map(one, range(first, min(first + step, rows))))
                out.seek(begin + first * each)
                out.write(data)
                out.flush()
                sums[first] = zlib.crc32(data)
                notes.write(json.dumps({"first": first, "sum": sums[first]}) + "\n")
                notes.flush()
            tell(min(first + step, rows))
        os.fsync(out.fileno())
        out.seek(begin)
        for first in range(0, rows, step):
            if zlib.crc32(out.read(min(step, rows - first) * each)) != sums[first]:
                raise OSError(f"images {first} .. {min(first + step, rows) - 1} were not written correctly")
