"""Write any data set as an FFCV file (.beton): exact pixels, the row, the weak label.

Images of one size are stored raw; files of any size are stored as they are (the same bytes, so nothing is lost and the
copy is as small as the original). Not with FFCV's DatasetWriter, whose helper processes leave the caller waiting for
ever when one of them meets an unreadable image.

Where every image will lie follows from the sizes alone, so the file is the same whoever reads the images, in spans of
some 32 MB: this process, or tasks elsewhere (``fetch``). A span that is in the file is noted beside it with its
checksum; a writer that was stopped goes on after the last one, and at the end all of the file is read again.

    python -m raycon.data write-ffcv fashion-mnist --out fashion-mnist.beton
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .datasets import FileSet, ImageSet

log = logging.getLogger(__name__)

CHECKED_ROWS = 64
"""Rows whose stored pixels are compared with the source when a file is written or found."""
SPAN_BYTES = 32 * 2**20
"""What is read and written at once, about."""


class Span(NamedTuple):
    """Consecutive rows and where they lie in the file."""

    first: int
    start: NDArray[np.int64]
    """Of each row."""
    size: NDArray[np.int64]
    """Bytes of each row."""


Fetch = Callable[[ImageSet, Iterable[Span]], Iterator[bytes]]
"""Gives ``pack`` of each span, in order."""


def import_ffcv() -> Any:
    """The module ``ffcv`` with its parts that are used here, kept from changing torch's thread count.

    FFCV sets torch's threads of the whole process to its own, at import and at every epoch start; that would slow the
    training down and change its rounding. Raises ImportError, with what to do, where FFCV is absent or broken.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv.fields
        import ffcv.loader
        import ffcv.memory_allocator
        import ffcv.reader
        import ffcv.types
        import numba
        from ffcv.pipeline.compiler import Compiler
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        raise ImportError(
            f"FFCV cannot be imported ({error}): install raycon[ffcv] (it is compiled and needs Debian's "
            "libopencv-dev, libturbojpeg0-dev and pkg-config), or choose --data.loader torch"
        ) from error

    def set_num_threads(cls: Any, count: int) -> None:
        cls.num_threads = min(max(count, 1), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        numba.set_num_threads(cls.num_threads)

    Compiler.set_num_threads = classmethod(set_num_threads)
    torch.set_num_threads(threads)
    return ffcv


def ensure_beton(dataset: ImageSet, folder: Path) -> Path:
    """The .beton of this data in ``folder``, written if it is not there, not whole or not of this data.

    Processes that ask at the same time wait for the first one to write it. Raises ConfigError when the folder cannot be
    written, ValueError naming an unreadable image.
    """
    from .common import file_lock

    file = folder / f"{dataset.fingerprint}.beton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / f"{dataset.fingerprint}.lock"):
            if file.exists():
                problem = beton_problem(file, dataset)
                if problem is None:
                    return file
                log.warning("%s: %s; writing it again", file, problem)
            log.info("writing %d images to %s", len(dataset), file)
            write_beton(dataset, file)
    except OSError as error:
        raise ConfigError([f"data.cache: cannot write {file} ({error}); give a folder with room in it"]) from error
    return file


def write_beton(
    dataset: ImageSet, file: Path, progress: Callable[[int], None] | None = None, fetch: Fetch | None = None
) -> None:
    """Write ``file``: under another name first, checked, then renamed, so that a half-written one is never seen.

    progress: is told the number of rows in the file, at the beginning and after every span. fetch: reads the images;
    without it this process does. What a stopped writer left (``.NAME.part``) is gone on with when it is of this data.
    Raises ValueError naming an unreadable image, ConfigError while another process writes the file, OSError.
    """
    part, journal = (file.with_name(f".{file.name}.{ending}") for ending in ("part", "part.jsonl"))
    progress = progress or (lambda rows: None)
    with open(part, "a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                [f"{file} is being written by another process: wait for it, or give another name"]
            ) from None
        try:
            _write(dataset, part, journal, progress, fetch or _fetch_here)
            problem = beton_problem(part, dataset)
            if problem is not None:
                raise OSError(f"{file} was not written correctly: {problem}")
        except (ValueError, OSError):  # would come again; what a killed process leaves is gone on with
            part.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            raise
        os.replace(part, file)
        journal.unlink(missing_ok=True)


def beton_problem(file: Path, dataset: ImageSet) -> str | None:
    """What keeps ``file`` from being this data set's .beton: None when it is whole and of this data.

    Compares sizes, every row number and label, and the pixels of some rows.
    """
    ffcv = import_ffcv()
    types, rows, size = ffcv.types, len(dataset), file.stat().st_size
    if size < types.HeaderType.itemsize:
        return "it is too short to be a .beton file"
    header = np.fromfile(file, types.HeaderType, 1)[0]
    if header["version"] != types.CURRENT_VERSION or header["num_fields"] != 3:
        return "it is not a .beton file of this kind"
    if header["num_samples"] != rows:
        return f"it holds {header['num_samples']} images, not {rows}"
    if int(header["alloc_table_ptr"]) + rows * types.ALLOC_TABLE_TYPE.itemsize != size:
        return "it was not written to its end"
    try:
        reader = ffcv.reader.Reader(str(file))
    except Exception as error:  # FFCV trusts what it reads
        return f"its tables cannot be read ({type(error).__name__}: {error})"
    field = reader.handlers.get("image")
    expected = _image_field(ffcv, dataset)
    if list(reader.handlers) != ["image", "row", "label"] or type(field) is not type(expected):
        return f"it has the fields {list(reader.handlers)}"
    if dataset.image is not None and tuple(int(n) for n in field.shape) != expected.shape:
        return f"its images are {field.shape}, not {expected.shape}"
    if not np.array_equal(reader.metadata["f1"], np.arange(rows)) or not np.array_equal(
        reader.metadata["f2"], dataset.weak
    ):
        return "its row numbers or labels differ"
    starts, sizes = reader.alloc_table["ptr"].astype(np.uint64), reader.alloc_table["size"].astype(np.uint64)
    place = reader.metadata["f0"] if dataset.image is not None else reader.metadata["f0"]["ptr"]
    if (starts > size).any() or (sizes > size - starts).any() or not np.array_equal(place, starts):
        return "an image lies outside of it"  # compiled code would read there
    content = np.memmap(file, np.uint8, mode="r")
    for row in np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(np.int64)):
        _, start, length = reader.alloc_table[row].tolist()
        if not np.array_equal(content[start : start + length], _stored(dataset, int(row))):
            return f"its image {row} differs"
    return None


def _image_field(ffcv: Any, dataset: ImageSet) -> Any:
    if dataset.image is None:
        return ffcv.fields.BytesField()
    channels, height, width = dataset.image
    return ffcv.fields.NDArrayField(np.dtype("u1"), (height, width, channels))


def _stored(dataset: ImageSet, row: int) -> NDArray[np.uint8]:
    """What is stored of an image: raw pixels, or the bytes of its file."""
    if dataset.image is not None:
        return np.ascontiguousarray(dataset.read(row)).reshape(-1)
    assert isinstance(dataset, FileSet), "a data set without a fixed image size has files"
    return np.frombuffer(dataset.encoded(row), np.uint8)


def pack(dataset: ImageSet, span: Span) -> bytes:
    """What the file holds from the first to the last byte of a span. Raises ValueError naming an unreadable image."""
    begin = int(span.start[0])
    region = np.zeros(int(span.start[-1] + span.size[-1]) - begin, dtype=np.uint8)
    stored: Iterable[Any] = (_stored(dataset, span.first + i) for i in range(len(span.start)))
    if isinstance(dataset, FileSet):
        whole = dataset.encoded_many(range(span.first, span.first + len(span.start)))
        stored = (np.frombuffer(data, np.uint8) for data in whole)
    places = zip((span.start - begin).tolist(), span.size.tolist(), stored, strict=True)
    for i, (start, size, data) in enumerate(places):
        if len(data) != size:
            raise ValueError(f"{dataset.where(span.first + i)}: has changed from {size} to {len(data)} bytes meanwhile")
        region[start : start + size] = data
    return region.tobytes()


def _fetch_here(dataset: ImageSet, spans: Iterable[Span]) -> Iterator[bytes]:
    return (pack(dataset, span) for span in spans)


def _places(dataset: ImageSet, before: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """FFCV's page size, and where each row's bytes begin and how many they are, after ``before`` bytes of tables."""
    rows = len(dataset)
    size = np.full(rows, np.prod(dataset.image or 0), dtype=np.int64)
    if isinstance(dataset, FileSet):
        size = dataset.sizes()
    page_size = 1 << 21  # FFCV's smallest; an image may not cross the end of a page
    page_size = max(page_size, 1 << (max(int(size.max()), 1) - 1).bit_length())
    start = np.empty(rows, dtype=np.int64)
    end = -(-before // page_size) * page_size
    page_end = end
    for row, length in enumerate(size.tolist()):
        if end + length > page_end:
            end, page_end = page_end, page_end + page_size
        start[row] = end
        end += length
    return page_size, start, size


def _spans(start: NDArray[np.int64], size: NDArray[np.int64]) -> list[Span]:
    number = (np.cumsum(size) - size) // SPAN_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(start)]
    return [Span(a, start[a:b], size[a:b]) for a, b in itertools.pairwise(cuts)]


def _write(dataset: ImageSet, part: Path, journal: Path, progress: Callable[[int], None], fetch: Fetch) -> None:
    """FFCV's format: header, field descriptions, per-sample metadata, pages of data, allocation table."""
    ffcv = import_ffcv()
    types, rows = ffcv.types, len(dataset)
    fields = {"image": _image_field(ffcv, dataset), "row": ffcv.fields.IntField(), "label": ffcv.fields.IntField()}
    type_ids = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
    described = np.zeros(len(fields), types.FieldDescType)
    for place, (name, field) in zip(described, fields.items(), strict=True):
        place["type_id"] = type_ids[type(field)]
        place["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        place["arguments"][:] = field.to_binary()[0]
    metadata = np.zeros(rows, types.get_metadata_type(list(fields.values())))
    metadata["f1"], metadata["f2"] = np.arange(rows), dataset.weak
    before = types.HeaderType.itemsize + described.nbytes + metadata.nbytes
    page_size, start, size = _places(dataset, before)
    if dataset.image is None:
        metadata["f0"]["ptr"], metadata["f0"]["size"] = start, size
    else:
        metadata["f0"] = start
    allocated = np.zeros(rows, types.ALLOC_TABLE_TYPE)
    for column, values in zip(types.ALLOC_TABLE_TYPE.names, (np.arange(rows), start, size), strict=True):
        allocated[column] = values
    table = -(-int(start[-1] + size[-1]) // page_size) * page_size  # the last page is filled up with zeros

    with open(part, "r+b") as out:
        _write_spans(dataset, out, journal, _spans(start, size), progress, fetch)
        out.seek(table)
        out.write(allocated.tobytes())
        out.truncate()
        header = np.zeros(1, types.HeaderType)
        header["version"], header["num_fields"] = types.CURRENT_VERSION, len(fields)
        header["page_size"], header["num_samples"], header["alloc_table_ptr"] = page_size, rows, table
        out.seek(0)
        for block in (header, described, metadata):
            out.write(block.tobytes())
        out.flush()
        os.fsync(out.fileno())


def _write_spans(
    dataset: ImageSet,
    out: IO[bytes],
    journal: Path,
    spans: list[Span],
    progress: Callable[[int], None],
    fetch: Fetch,
) -> None:
    """Write the spans that are not in the file yet, then read all of them again."""
    head = {"data": dataset.fingerprint, "rows": len(dataset), "spans": len(spans)}
    sums = noted(journal, head)
    done = [span for span in spans if span.first in sums]
    if done:
        log.info("going on after %d of %d images", sum(len(s.start) for s in done), len(dataset))
    else:
        out.truncate(0)
        journal.write_text(json.dumps(head) + "\n", encoding="utf-8")
    rows = sum(len(span.start) for span in done)
    progress(rows)
    left = [span for span in spans if span.first not in sums]
    with journal.open("a", encoding="utf-8") as notes:
        for span, data in zip(left, fetch(dataset, left), strict=True):
            out.seek(int(span.start[0]))
            out.write(data)
            out.flush()
            sums[span.first] = zlib.crc32(data)
            notes.write(json.dumps({"first": span.first, "sum": sums[span.first]}) + "\n")
            notes.flush()
            rows += len(span.start)
            progress(rows)
    for span in spans:
        out.seek(int(span.start[0]))
        data = out.read(int(span.start[-1] + span.size[-1] - span.start[0]))
        if zlib.crc32(data) != sums[span.first]:
            raise OSError(f"images {span.first} .. {span.first + len(span.start) - 1} were not written correctly")


def noted(journal: Path, head: dict[str, Any]) -> dict[int, int]:
    """By its first row the checksum of each span that a stopped writer of this data had finished."""
    try:
        first, *lines = journal.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != head:
            return {}
    except (OSError, ValueError):
        return {}
    sums = {}
    for line in lines:
        try:
            note = json.loads(line)
            sums[int(note["first"])] = int(note["sum"])
        except (ValueError, KeyError, TypeError):  # the last one, torn
            break
    return sums
