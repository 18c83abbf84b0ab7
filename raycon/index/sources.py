"""Feature tables on disk, read block after block: .npy, .parquet, and folders of them in the order of their names.

Shape letters: N rows, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

BLOCK = 8192


class Source:
    """The rows of one or several files, one after the other."""

    def __init__(self, files: list[Path], column: str = "") -> None:
        """Reads no rows yet. Raises ConfigError naming every file that cannot be used, and why."""
        problems: list[str] = []
        self._tables: list[_Npy | _Parquet] = []
        for file in files:
            try:
                self._tables.append(_Parquet(file, column) if file.suffix == ".parquet" else _Npy(file))
            except ConfigError as error:
                problems += error.problems
        widths = {t.dim for t in self._tables}
        if len(widths) > 1:
            problems += [f"{t.file}: rows of {t.dim} numbers, {self._tables[0].file}: {self._tables[0].dim}; "
                         "one index holds rows of one width" for t in self._tables if t.dim != self._tables[0].dim]  # fmt: skip
        if problems:
            raise ConfigError(problems)
        self.rows = sum(t.rows for t in self._tables)
        self.dim = self._tables[0].dim

    def blocks(self, metric: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, (n, D) float32) of all rows in order; of unit length when the metric is cosine.

        Raises ConfigError for the first row that is not finite or, for cosine, zero: it names file and row.
        """
        first = 0
        for table in self._tables:
            inside = 0
            for block in table.read():
                yield first, _prepared(block, metric, table.file, inside)
                first, inside = first + len(block), inside + len(block)


def open_source(path: Path, column: str = "") -> Source:
    """A .npy or .parquet file, or a folder of such. Raises ConfigError."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".npy", ".parquet") and f.is_file())
        kinds = {f.suffix for f in files}
        if len(kinds) > 1:  # a folder may hold labels as .npy beside a table
            files = [f for f in files if f.suffix == ".parquet"]
        if not files:
            raise ConfigError([f"{path}: neither an index (rows-*.json) nor a folder of .npy or .parquet files"])
        return Source(files, column)
    if not path.exists():
        raise ConfigError([f"{path}: no such file"])
    if path.suffix not in (".npy", ".parquet"):
        raise ConfigError([f"{path}: give a .npy or .parquet file, a folder of such, or an index"])
    return Source([path], column)


class _Npy:
    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._array: NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # NumPy's reader of headers raises half a dozen kinds
            raise ConfigError([f"{file} is no array that can be read: {str(error)[:200]}"]) from None
        if self._array.ndim != 2 or self._array.dtype.kind != "f" or 0 in self._array.shape:
            raise ConfigError(
                [f"{file}: {self._array.dtype} of shape {self._array.shape}; give floats of shape (N, D)"]
            )
        self.rows, self.dim = self._array.shape

    def read(self) -> Iterator[NDArray[np.float32]]:
        for start in range(0, self.rows, BLOCK):
            yield np.array(self._array[start : start + BLOCK], dtype=np.float32)


class _Parquet:
    def __init__(self, file: Path, column: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ConfigError(
                [f"{file}: reading Parquet needs pyarrow: pip install 'raycon[ray]', or give .npy"]
            ) from None
        self.file = file
        try:
            self._table = pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError([f"{file} is no Parquet file that can be read: {error}"]) from None
        schema = self._table.schema_arrow

        def usable(kind: Any) -> bool:
            listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            return bool(listed and pa.types.is_floating(kind.value_type))

        found = [field.name for field in schema if usable(field.type)]
        if column and column not in found:
            raise ConfigError(
                [f"{file}: no column {column!r} of lists of floats; there are {', '.join(found) or 'none'}"]
            )
        if not column and len(found) != 1:
            raise ConfigError([f"{file}: {len(found)} columns of lists of floats ({', '.join(found) or 'none'}) among "
                               f"{', '.join(schema.names)}; name one with --column"])  # fmt: skip
        self._column = column or found[0]
        self.rows = self._table.metadata.num_rows
        if not self.rows:
            raise ConfigError([f"{file}: no rows"])
        self.dim = len(next(self._table.iter_batches(1, columns=[self._column])).column(0)[0].as_py() or ())
        if not self.dim:
            raise ConfigError([f"{file}: row 0 of column {self._column!r} is empty"])

    def read(self) -> Iterator[NDArray[np.float32]]:
        row = 0
        for batch in self._table.iter_batches(BLOCK, columns=[self._column]):
            lists = batch.column(0)
            values = lists.flatten()  # leaves out what is null
            if values.null_count or len(values) != len(lists) * self.dim:
                sizes = [None if v is None else len(v) - v.count(None) for v in lists.to_pylist()]
                wrong = next(i for i, size in enumerate(sizes) if size != self.dim)
                raise ConfigError(
                    [
                        f"{self.file}: row {row + wrong} of {self._column!r} has {sizes[wrong] or 'no'} numbers, not {self.dim}"
                    ]
                )
            yield np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(-1, self.dim)
            row += len(lists)


def _prepared(block_ND: NDArray[np.float32], metric: str, file: Path, first: int) -> NDArray[np.float32]:
    finite_N = np.isfinite(block_ND).all(1)
    if not finite_N.all():
        raise ConfigError(
            [f"{file}: row {first + int(np.argmin(finite_N))} holds a number that is not finite; drop the row"]
        )
    if metric != "cosine":
        return block_ND
    norm_N = np.linalg.norm(block_ND.astype(np.float64), axis=1)
    if not norm_N.all():
        row = first + int(np.argmin(norm_N))
        raise ConfigError([f"{file}: row {row} is zero, which has no direction; drop the row, or give --metric l2"])
    return (block_ND / norm_N[:, None]).astype(np.float32)
