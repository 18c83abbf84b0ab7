"""Data sets that a file lists: what its columns mean, read as a stream into a few arrays.

A *role* is what a column is for: path, label (fine), weak, split, or attributes (several columns).
"""

from __future__ import annotations

import csv
import io
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError
from raycon.index import metadata

from . import files
from .datasets import IMAGENET_MEAN, IMAGENET_STD, FileSet, check_labels, no_labels

log = logging.getLogger(__name__)

ROLES = ("path", "label", "weak", "split", "attributes")
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.0)?")
_CHECKED = 10_000
"""Files of a list that are looked for when it is opened: evenly spaced ones, all of a shorter list."""

Line = tuple[str, "tuple[str, ...]"]
"""Where a line stands, for messages, and its cells in the order of the columns that were asked for."""


class Values:
    """A column as numbers of its distinct values."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._codes = array("q")

    def add(self, value: str) -> None:
        self._codes.append(self.numbers.setdefault(value, len(self.numbers)))

    @property
    def code(self) -> NDArray[np.int64]:
        return np.frombuffer(self._codes, dtype=np.int64) if len(self._codes) else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Listed:
    """What a file lists, the lines of one split."""

    files: NDArray[np.bytes_]
    columns: dict[str, Values] = field(repr=False)
    """By role; attributes by ``attributes:NAME``."""


def split_file(listing: str, split: str) -> Path | str:
    """The file for a split: {split} replaced (for test by val where there is no test). Raises ConfigError."""
    if not listing:
        raise ConfigError(["data.listing is not given: it names the file that lists the images, train.txt say"])
    if "{split}" not in listing:
        place = files.place_of(listing)
        if not files.is_file(place):
            raise ConfigError([f"data.listing = {listing!r}: no such file"])
        return place
    names = ("test", "val") if split == "test" else (split,)
    places = [files.place_of(listing.replace("{split}", name)) for name in names]
    found = next((place for place in places if files.is_file(place)), None)
    if found is None:
        raise ConfigError([f"data.listing = {listing!r}: no file {' or '.join(map(str, places))} for split {split!r}"])
    return found


def text_lines(file: Path | str, roles: Sequence[str]) -> Iterator[Line]:
    """Lines of values between white space, one per role. A path in the first place may have blanks in it."""
    for number, line in enumerate(files.read_lines(file), start=1):
        where = f"{file}: line {number}"
        last = roles.index("path") == len(roles) - 1
        cells = line.split(None, len(roles) - 1) if last else line.rsplit(None, len(roles) - 1)
        if len(cells) != len(roles):
            raise ConfigError(
                [
                    f"{where}: {line.strip()!r} has not {len(roles)} parts ({' '.join(roles)}); mend it, or say what the "
                    "parts are: --data.columns path, for a list without labels"
                ]
            )
        yield where, tuple(cell.strip() for cell in cells)


def csv_lines(file: Path | str, names: Sequence[str]) -> Iterator[Line]:
    """The named columns of a CSV (or TSV: tabs) with a header. A last line of index -1 (as in rank_H) is left out."""
    try:
        text = files.read_bytes(file).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if str(file).endswith(".tsv") else ",")
        header = next(reader, [])
        at = _places(file, names, header)
        for cells in reader:
            if not cells or (header[0] == "" and cells[0].split(".")[0] == "-1"):
                continue
            where = f"{file}: line {reader.line_num}"
            if len(cells) != len(header):
                raise ConfigError([f"{where} has {len(cells)} cells, the header {len(header)}; mend it"])
            yield where, tuple(cells[i].strip() for i in at)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not a CSV file ({error})"]) from error


def parquet_lines(file: Path | str, names: Sequence[str]) -> Iterator[Line]:
    """The named columns of a Parquet file. Raises ConfigError, also without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError([f"{file}: Parquet needs pyarrow; pip install pyarrow, or write a CSV"]) from None
    try:
        source: Any = str(file) if isinstance(file, Path) else files.file_system(file).open(file, "rb")
        with pyarrow.parquet.ParquetFile(source) as table:
            _places(file, names, table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(columns=list(dict.fromkeys(names))):
                columns = [batch.column(name).to_pylist() for name in names]
                for cells in zip(*columns, strict=True):
                    yield f"{file}: row {row}", tuple("" if cell is None else str(cell).strip() for cell in cells)
                    row += 1
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise ConfigError([f"{file}: not a Parquet file ({error})"]) from error


def _places(file: Path | str, names: Sequence[str], header: Sequence[str]) -> list[int]:
    if missing := [name for name in names if name not in header]:
        raise ConfigError(
            [
                f"{file} has no column {missing[0]!r}; it has {', '.join(map(repr, header))}: name them with data.columns, "
                "path=COLUMN label=COLUMN"
            ]
        )
    return [list(header).index(name) for name in names]


def collect(lines: Iterable[Line], roles: Sequence[str], root: Path | str, splits: tuple[str, ...]) -> Listed:
    """The lines of ``splits`` (all, without a role split). Raises ConfigError naming a line that is wrong."""
    columns = {role: Values() for role in roles if role not in ("path", "split")}
    parts: list[NDArray[np.bytes_]] = []
    pending: list[bytes] = []
    by_split: dict[str, int] = {}
    at_split = roles.index("split") if "split" in roles else -1
    at_path = roles.index("path")
    for where, cells in lines:
        if at_split >= 0:
            by_split[cells[at_split]] = by_split.get(cells[at_split], 0) + 1
            if cells[at_split] not in splits:
                continue
        pending.append(files.below(cells[at_path], root, where))
        for role, cell in zip(roles, cells, strict=True):
            if role in columns:
                if not cell:
                    raise ConfigError([f"{where}: no {role}; give one in every line, or leave the role out"])
                columns[role].add(cell)
        if len(pending) == 1 << 16:  # never a Python object per image for long
            parts.append(np.array(pending, dtype=np.bytes_))
            pending = []
    parts.append(np.array(pending, dtype=np.bytes_))
    found = np.concatenate(parts)
    if not len(found) and by_split:
        raise ConfigError([f"no line of split {' or '.join(splits)}; there are {', '.join(sorted(by_split))}"])
    return Listed(found, columns)


def classes_of(values: Values, where: str) -> tuple[str, ...] | None:
    """The classes in order, None when the values are numbers, which are then the labels themselves."""
    if not values.numbers or not all(_NUMBER.fullmatch(value) for value in values.numbers):
        return tuple(sorted(values.numbers))
    most = max(int(float(value)) for value in values.numbers)
    if most > 1000 + 10 * len(values.numbers):
        raise ConfigError(
            [f"{where}: label {most} among {len(values.numbers)} different labels: number classes from 0, or name them"]
        )
    return None


def labels(values: Values, classes: tuple[str, ...] | None, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(N,) labels and the classes' names. Raises ConfigError naming a value that is none of ``classes``."""
    if classes is None:
        number = {}
        for value in values.numbers:
            if not _NUMBER.fullmatch(value) or float(value) < -1:
                raise ConfigError([f"{where}: label {value!r}, but those of the train split are numbers; mend it"])
            number[value] = int(float(value))
        names = tuple(str(i) for i in range(max(number.values(), default=-1) + 1))
    else:
        number = {name: i for i, name in enumerate(classes)}
        names = classes
        if foreign := [value for value in values.numbers if value not in number]:
            raise ConfigError([f"{where}: label {foreign[0]!r} is none of the train split's; mend it"])
    table = np.array([number[value] for value in values.numbers], dtype=np.int64)
    return table[values.code] if len(table) else no_labels(0), names


def build(name: str, split: str, root: Path | str, listed: Listed, train: Listed, level: str, where: str) -> FileSet:
    """The data set of what was listed; the classes are those of the train split."""
    found = FileSet(
        name=name, split=split, root=root, files=listed.files, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        **labelled(listed, train, level, where),
    )  # fmt: skip
    warn(found, where)
    _look_for_some(found, where)
    return found


def labelled(
    listed: Listed, train: Listed, level: str, where: str, names: dict[str, tuple[str, ...]] | None = None
) -> dict[str, Any]:
    """The fields of an ImageSet that follow from the columns; the classes are those of the train split.

    names: by role the classes' names where a file's own description has them; its labels are then numbers.
    """
    made: dict[str, tuple[NDArray[np.int64], tuple[str, ...]]] = {}
    for role in ("label", "weak"):
        made[role] = (no_labels(len(listed.files)), ())
        if role in listed.columns:
            classes = classes_of(train.columns[role], where) if role in train.columns else None
            label, found = labels(listed.columns[role], classes, f"{where}, {role}")
            if (named := (names or {}).get(role)) and classes is None:
                check_labels(label[label >= 0], len(named), f"{where}, {role}")
                found = named
            made[role] = (label, found)
    attributes_of = tuple(role.split(":", 1)[1] for role in listed.columns if role.startswith("attributes:"))
    table = [listed.columns[f"attributes:{attribute}"].code for attribute in attributes_of]
    attributes = np.stack(table, axis=1) if table else None
    if level:
        if attributes is None or not level.isdigit() or not 1 <= int(level) <= len(attributes_of):
            raise ConfigError(
                [
                    f"data.level = {level!r}: a number of attributes, 1 .. {len(attributes_of)}, whose combinations are "
                    "the weak labels; name the attributes with --data.columns attributes=COLUMN,COLUMN"
                ]
            )
        weak = metadata.attribute_clusters(attributes, int(level))
        made["weak"] = (weak, tuple(f"cluster {i}" for i in range(int(weak.max(initial=-1)) + 1)))
    return {
        "label": made["label"][0], "classes": made["label"][1], "weak": made["weak"][0],
        "weak_classes": made["weak"][1], "attributes": attributes, "attribute_names": attributes_of,
    }  # fmt: skip


def warn(dataset: FileSet, where: str) -> None:
    """Of files that are listed more than once, and of classes of the train split that have no images."""
    order = np.argsort(dataset.files, kind="stable")
    ordered = dataset.files[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(again):
        row = int(order[again[0]])
        log.warning("%s: %d images are listed more than once, '%s' for one", where, len(again), dataset.where(row))
    known = dataset.label[dataset.label >= 0]
    empty = np.flatnonzero(np.bincount(known, minlength=len(dataset.classes)) == 0)
    if dataset.split == "train" and len(empty):
        names = ", ".join(dataset.classes[i] for i in empty[:8])
        log.warning("%s: %d of %d classes have no images: %s", where, len(empty), len(dataset.classes), names)


def _look_for_some(dataset: FileSet, where: str) -> None:
    """Raises ConfigError when one of up to 10,000 files (evenly spaced) of a local list is not there."""
    if not isinstance(dataset.root, Path):
        return
    rows = np.unique(np.linspace(0, max(len(dataset) - 1, 0), min(_CHECKED, len(dataset))).astype(np.int64))
    gone = np.flatnonzero(files.local_stats(bytes(dataset.root), dataset.files[rows])[0] < 0)
    if len(gone) and len(gone) < len(rows):
        return  # some are missing: named when they are read, or left out with on_error = skip
    if len(gone):
        raise ConfigError(
            [f"{where}: its first image '{dataset.where(int(rows[0]))}' is not there; is data.root right?"]
        )
