"""Which images of a data set can be read: every file opened and decoded once, by as many threads as there are CPUs."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .datasets import DAMAGED, FileSet, damage
from .progress import progress

log = logging.getLogger(__name__)

PART = 64
"""Images per task of a thread."""


class Seen(NamedTuple):
    """What was found of one image."""

    row: int
    height: int
    width: int
    size: int
    """Bytes of its file."""
    digest: bytes
    """Of its file: the same for copies."""
    problem: str
    """Why it cannot be read; empty when it can."""


def look(dataset: FileSet, row: int, decode: bool = True) -> Seen:
    """Read one image to its end. JPEGs are decoded at 1/8 of their size: every byte of them, in a fifth of the time.

    decode: False only reads the file. A problem is given back, not raised.
    """
    from PIL import Image

    size, digest = -1, b""
    try:
        data = dataset.encoded(row)
        size, digest = len(data), hashlib.blake2b(data, digest_size=12).digest()
        if not decode:
            return Seen(row, 0, 0, size, digest, "")
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.draft("RGB", (1, 1))
            image.load()
    except (*DAMAGED, Image.DecompressionBombError) as error:
        return Seen(row, 0, 0, size, digest, damage(error).removeprefix(f"{dataset.where(row)}: "))
    return Seen(row, height, width, size, digest, "")


def look_at(dataset: FileSet, rows: NDArray[np.int64], decode: bool = True) -> Iterator[Seen]:
    """``look`` at each of ``rows``, in order."""

    def part(rows: Sequence[int]) -> list[Seen]:
        return [look(dataset, row, decode) for row in rows]

    parts = [rows[first : first + PART].tolist() for first in range(0, len(rows), PART)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(part, parts):
            yield from found


def readable_only(dataset: FileSet, cache: Path) -> FileSet:
    """The images that can be read, rows numbered anew. What cannot is warned about, named, and kept in ``cache``.

    All images are read the first time; the result is found again as long as paths, sizes and times of the files are the
    same. Raises ConfigError when nothing is left or the cache cannot be written.
    """
    from .common import file_lock

    size, _ = dataset.stats()
    here = dataset.subset(np.flatnonzero(size >= 0)) if (size < 0).any() else dataset
    if not len(here):
        raise ConfigError(
            [f"data.name = {dataset.name!r}: none of its {len(dataset)} images is there; is data.root right?"]
        )
    file = cache / f"{here.fingerprint}.unreadable.json"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with file_lock(cache / f"{here.fingerprint}.lock"):
            bad = _known(file, len(here))
            if bad is None:
                log.info("looking for unreadable images among %d", len(here))
                with progress("images read", len(here)) as tell:
                    bad = {}
                    for seen in look_at(here, np.arange(len(here))):
                        if seen.problem:
                            bad[seen.row] = f"{here.where(seen.row)}: {seen.problem}"
                        tell(seen.row + 1)
                part = file.with_suffix(".part")
                part.write_text(json.dumps({"images": len(here), "unreadable": bad}, indent=1), encoding="utf-8")
                os.replace(part, file)
    except OSError as error:
        raise ConfigError([f"data.cache: cannot write {file} ({error}); give a folder with room in it"]) from error
    left = np.setdiff1d(np.arange(len(here)), np.array(list(bad), dtype=np.int64))
    dropped = len(dataset) - len(left)
    if not len(left):
        raise ConfigError([f"data.name = {dataset.name!r}: none of its {len(dataset)} images can be read; see {file}"])
    if not dropped:
        return dataset
    named = [f"{dataset.where(int(row))}: no such file" for row in np.flatnonzero(size < 0)[:8]] + list(bad.values())[
        :8
    ]
    _warn_once(
        f"{dataset.name}, split {dataset.split}: {dropped} of {len(dataset)} images cannot be read and are left out: "
        f"{'; '.join(named[:8])}{f'; and more, see {file}' if dropped > 8 else ''}"
    )
    return here.subset(left, dropped=dropped)


@functools.cache
def _warn_once(text: str) -> None:
    """A run opens its data several times in a process."""
    log.warning("%s", text)


def _known(file: Path, images: int) -> dict[int, str] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {int(row): str(why) for row, why in found["unreadable"].items()} if found["images"] == images else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
