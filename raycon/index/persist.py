"""Features on disk: a folder of parts, each a plain .npy file with a manifest that can tell when a byte was altered.

    rows-0-750.v3.npy     (750, D) float32 or float16, written once, never changed
    rows-0-750.json       format, version, range of rows, rows of the whole, width, metric, SHA-256 of every piece

A part appears with its manifest, which is put in place when the .npy is complete and on disk; a manifest of another
version names another file, so a crash in between leaves the former part whole. Pieces (16 MB) are checked as they are
read: a shard that needs a few rows of a large part reads and checks only those. Nothing is ever unpickled.

Shape letters: N rows of a part, D feature width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
PIECE_BYTES = 1 << 24
Storage = Literal["float32", "float16"]


class DamagedPart(ValueError):
    """A part that is missing, cut off or altered; the message names the file, the rows and what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A manifest: rows ``first_row .. last_row`` of ``rows``, in ``file`` beside it."""

    format: int
    version: int
    first_row: int
    last_row: int
    rows: int
    dim: int
    storage: Storage
    metric: str
    """cosine: rows are of unit length; l2: as they were given."""
    file: str
    piece_rows: int
    sha256: tuple[str, ...]
    """Of the bytes of every ``piece_rows`` rows; the last piece may be shorter."""

    @property
    def row_bytes(self) -> int:
        return self.dim * np.dtype(self.storage).itemsize


class PartWriter:
    """Writes one part, block after block; it appears in the folder at ``close``, and not at all after an error."""

    def __init__(
        self,
        folder: Path,
        version: int,
        first_row: int,
        last_row: int,
        rows: int,
        dim: int,
        storage: Storage = "float32",
        metric: str = "cosine",
    ) -> None:
        assert 0 <= first_row < last_row <= rows
        folder.mkdir(parents=True, exist_ok=True)
        piece_rows = max(1, PIECE_BYTES // (dim * np.dtype(storage).itemsize))
        self._folder = folder
        self._facts: dict[str, Any] = {
            "format": FORMAT, "version": version, "first_row": first_row, "last_row": last_row, "rows": rows,
            "dim": dim, "storage": storage, "metric": metric,
            "file": f"rows-{first_row}-{last_row}.v{version}.npy", "piece_rows": piece_rows,
        }  # fmt: skip
        self._piece_bytes = piece_rows * dim * np.dtype(storage).itemsize
        self._left = (last_row - first_row) * dim * np.dtype(storage).itemsize
        self._sums: list[str] = []
        self._digest, self._in_piece = hashlib.sha256(), 0
        self._work = folder / f".{self._facts['file']}.{os.getpid()}.part"
        self._handle = self._work.open("wb")
        shape = (last_row - first_row, dim)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(storage)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._handle, header)

    def write(self, block_ND: NDArray[np.float32]) -> None:
        """Append rows. Raises ValueError for numbers that float16 cannot hold, OSError when the disk is full."""
        storage = self._facts["storage"]
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(block_ND, dtype=storage)
        if storage == "float16" and not np.isfinite(stored).all():
            raise ValueError("a feature is too large for float16 (65504): write float32, or normalise the rows")
        data = stored.data.cast("B")
        self._left -= len(data)
        assert self._left >= 0, "more rows than announced"
        self._handle.write(data)
        while len(data):
            piece = data[: self._piece_bytes - self._in_piece]
            self._digest.update(piece)
            self._in_piece += len(piece)
            data = data[len(piece) :]
            if self._in_piece == self._piece_bytes:
                self._end_piece()

    def close(self) -> Part:
        """Put the part in place and drop what it replaces."""
        assert self._left == 0, "fewer rows than announced"
        if self._in_piece:
            self._end_piece()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        part = Part(**self._facts, sha256=tuple(self._sums))
        os.replace(self._work, self._folder / part.file)
        manifest = self._folder / f"rows-{part.first_row}-{part.last_row}.json"
        work = manifest.with_name(f".{manifest.name}.{os.getpid()}.part")
        with work.open("w", encoding="utf-8") as handle:
            json.dump(asdict(part), handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(work, manifest)
        for old in self._folder.glob(f"rows-{part.first_row}-{part.last_row}.v*.npy"):
            if old.name != part.file:
                old.unlink(missing_ok=True)
        return part

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._handle.close()
        self._work.unlink(missing_ok=True)

    def _end_piece(self) -> None:
        self._sums.append(self._digest.hexdigest())
        self._digest, self._in_piece = hashlib.sha256(), 0


def clear(folder: Path) -> None:
    """Drop every part in a folder, manifests first; nothing happens when there is none."""
    for pattern in ("rows-*-*.json", "rows-*-*.v*.npy", ".rows-*.part"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def read_manifest(file: Path) -> Part:
    """Raises DamagedPart when the file is no manifest of this format."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        names = {f.name for f in fields(Part)}
        if not isinstance(tree, dict) or tree.get("format") != FORMAT or set(tree) != names:
            raise ValueError(f"not a manifest of format {FORMAT}")
        part = Part(**{**tree, "sha256": tuple(tree["sha256"])})
        numbers = (part.version, part.first_row, part.last_row, part.rows, part.dim, part.piece_rows)
        words = (part.storage in ("float32", "float16"), part.metric in ("cosine", "l2"), isinstance(part.file, str))
        if not all(type(n) is int for n in numbers) or not all(words) or part.piece_rows < 1:
            raise ValueError("a number, the storage, the metric or the file is not as it is written")
        pieces = -(-(part.last_row - part.first_row) // part.piece_rows)
        if not 0 <= part.first_row < part.last_row <= part.rows or part.dim < 1 or len(part.sha256) != pieces:
            raise ValueError("its numbers contradict each other")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedPart(f"{file}: unreadable ({error}); write the part again") from None
    return part


def parts_of(folder: Path) -> list[Part]:
    """The parts in a folder by their first row. Raises DamagedPart for a manifest that cannot be read."""
    return sorted((read_manifest(f) for f in folder.glob("rows-*.json")), key=lambda p: p.first_row)


def overlapping(folder: Path, version: int | None, first_row: int, last_row: int) -> list[Part]:
    """The parts of a version (None: of any) that hold some of these rows, by row.

    Raises DamagedPart for an unreadable manifest.
    """
    found = []
    for file in folder.glob("rows-*-*.json"):
        first, last = (int(word) if word.isdigit() else 0 for word in file.stem.split("-")[1:3])
        if first < last_row and first_row < last:
            part = read_manifest(file)
            found += [part] if version in (None, part.version) else []
    return sorted(found, key=lambda p: p.first_row)


def whole(folder: Path) -> list[Part]:
    """The parts of a folder that holds every row of one version once, by row. Raises DamagedPart otherwise."""
    parts = parts_of(folder)
    if not parts:
        raise DamagedPart(f"{folder}: no index here (rows-*.json); write one with python -m raycon.index build")
    kinds = {(p.version, p.rows, p.dim, p.metric) for p in parts}
    if len(kinds) > 1:
        raise DamagedPart(f"{folder}: its parts are of different indexes ({sorted(kinds)}); build it again")
    row = 0
    for part in parts:
        if part.first_row != row:
            raise DamagedPart(f"{folder}: rows {min(row, part.first_row)} .. {max(row, part.first_row)} are "
                              f"{'missing' if part.first_row > row else 'there twice'}; build it again")  # fmt: skip
        row = part.last_row
    if row != parts[0].rows:
        raise DamagedPart(f"{folder}: rows {row} .. {parts[0].rows} are missing; build it again")
    return parts


def read_rows(folder: Path, part: Part, first_row: int, last_row: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, features (n, D) float32) of the rows ``first_row .. last_row`` that lie in the part, piece by piece.

    Each piece is checked before it is given. Raises DamagedPart naming file and rows.
    """
    file = folder / Path(part.file).name  # a name from a file may not lead out of the folder
    first_row, last_row = max(first_row, part.first_row), min(last_row, part.last_row)
    try:
        with file.open("rb") as handle:
            version = np.lib.format.read_magic(handle)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
            start = handle.tell()
            expected = ((part.last_row - part.first_row, part.dim), False, np.dtype(part.storage), (1, 0))
            if (shape, fortran, dtype, version) != expected:
                raise DamagedPart(f"{file}: its header is not that of its manifest; write the part again")
            size = os.fstat(handle.fileno()).st_size
            for piece in range(
                (first_row - part.first_row) // part.piece_rows, -(-(last_row - part.first_row) // part.piece_rows)
            ):
                low = part.first_row + piece * part.piece_rows
                high = min(low + part.piece_rows, part.last_row)
                handle.seek(start + (low - part.first_row) * part.row_bytes)
                # No more than there is: manifest and header may both claim any number.
                data = handle.read(min((high - low) * part.row_bytes, size))
                if hashlib.sha256(data).hexdigest() != part.sha256[piece]:
                    raise DamagedPart(f"{file}: rows {low} .. {high} are cut off or altered; write the part again")
                block = np.frombuffer(data, dtype=part.storage).reshape(-1, part.dim)
                begin, end = max(low, first_row), min(high, last_row)
                yield begin, block[begin - low : end - low].astype(np.float32)
    except DamagedPart:
        raise
    except Exception as error:  # NumPy's reader of headers raises half a dozen kinds
        raise DamagedPart(f"{file}: unreadable ({error}); write the part again") from None


def read_range(folder: Path, version: int, first_row: int, last_row: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, features) of the rows ``first_row .. last_row`` of a version, from whatever parts hold them."""
    row = first_row
    for part in overlapping(folder, version, first_row, last_row):
        if part.first_row <= row < part.last_row:
            yield from read_rows(folder, part, row, last_row)
            row = min(part.last_row, last_row)
    if row < last_row:
        raise DamagedPart(f"{folder}: rows {row} .. {last_row} of version {version} are not there")
