"""Write any data set as an FFCV file (.beton): exact pixels, the row, the weak label.

Images of one size are stored raw; files of any size are stored as they are (the same bytes, so nothing is lost and the
copy is as small as the original). Written in this process rather than with FFCV's DatasetWriter, whose helper processes
leave the caller waiting for ever when one of them meets an unreadable image.

    python -m raycon.data_loaders.write_ffcv fashion-mnist --out fashion-mnist.beton
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .common import file_lock
from .datasets import FileSet, ImageSet, names, open_dataset

log = logging.getLogger(__name__)

CHECKED_ROWS = 64
"""Rows whose stored pixels are compared with the source when a file is written or found."""


def import_ffcv() -> Any:
    """The module ``ffcv`` with its parts that are used here, kept from changing torch's thread count.

    FFCV sets torch's threads of the whole process to its own, at import and at every epoch start; that would slow the
    training down and change its rounding. Raises ImportError, with what to do, where FFCV is absent or broken.
    """
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


def write_beton(dataset: ImageSet, file: Path, progress: Callable[[int], None] | None = None) -> None:
    """Write ``file``: under another name first, checked, then renamed, so that a half-written one is never seen.

    ``progress`` is told the number of rows written. Raises ValueError naming an unreadable image, OSError.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            _write(dataset, out, progress or (lambda rows: None))
            out.flush()
            os.fsync(out.fileno())
        problem = beton_problem(part, dataset)
        if problem is not None:
            raise OSError(f"{file} was not written correctly: {problem}")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


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
    reader = ffcv.reader.Reader(str(file))
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


def _write(dataset: ImageSet, out: IO[bytes], progress: Callable[[int], None]) -> None:
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
    allocated = np.zeros(rows, types.ALLOC_TABLE_TYPE)

    page_size = 1 << 21  # FFCV's smallest; an image may not cross the end of a page
    if isinstance(dataset, FileSet):
        largest = max(dataset.stat(row).st_size for row in range(rows))
        page_size = max(page_size, 1 << (largest - 1).bit_length())
    before = types.HeaderType.itemsize + described.nbytes + metadata.nbytes
    end = -(-before // page_size) * page_size
    page_end = end
    for row in range(rows):
        data = _stored(dataset, row)
        if end + len(data) > page_end:
            end, page_end = page_end, page_end + page_size
        out.seek(end)
        out.write(data.data)
        allocated[row] = (row, end, len(data))
        end += len(data)
        progress(row + 1)
    if dataset.image is None:
        metadata["f0"]["ptr"], metadata["f0"]["size"] = allocated["ptr"], allocated["size"]
    else:
        metadata["f0"] = allocated["ptr"]
    out.seek(page_end)  # the last page is filled up with zeros
    out.write(allocated.tobytes())

    header = np.zeros(1, types.HeaderType)
    header["version"], header["num_fields"] = types.CURRENT_VERSION, len(fields)
    header["page_size"], header["num_samples"], header["alloc_table_ptr"] = page_size, rows, page_end
    out.seek(0)
    for part in (header, described, metadata):
        out.write(part.tobytes())


def main(arguments: list[str] | None = None) -> int:
    """Write one data set's split as a .beton file. Returns the exit code."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m raycon.data_loaders.write_ffcv", description=main.__doc__)
    parser.add_argument("dataset", help=f"one of {', '.join(names())}")
    parser.add_argument("--root", default="", help="where the data set's files are; empty: the usual places")
    parser.add_argument("--split", default="train", help="train or test")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        dataset = open_dataset(options.dataset, options.root, options.split)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("images written", total=len(dataset))
            write_beton(
                dataset,
                options.out.absolute(),
                lambda rows: bar.update(task, completed=rows) if not rows % 256 else None,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"{len(dataset)} images written to {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
