"""image-table: images that a CSV, TSV or Parquet file lists, with columns for path, labels, split and attributes.

data.listing is the file (.parquet, .tsv, else CSV with a header); {split} in it becomes train, val or test, or a column
of split values tells. Paths are below data.root (without one: below the file's folder). data.columns says which column
is what, ROLE=COLUMN: path (default: path), label, weak, split, and attributes=COLUMN,COLUMN,...; without it the columns
called path, label, weak and split are taken, those that are there. With attributes, data.level = g makes weak labels:
the combinations of the g attributes of highest entropy (Cl-InfoNCE).
"""

from __future__ import annotations

from pathlib import Path

from raycon.core.config import ConfigError

from .. import files, tables
from . import FileSet, unknown_split

REMOTE = True
SPLITS = ("train", "val", "test")


def open_split(
    root: Path | str | None, split: str, listing: str = "", columns: tuple[str, ...] = (), level: str = ""
) -> FileSet:
    """Raises ConfigError for an unknown split and whatever is wrong with the table, naming the line."""
    if split not in SPLITS:
        raise unknown_split("image-table", split, SPLITS)
    file = tables.split_file(listing, split)
    of = _columns(columns) if columns else _usual(file)
    if split != "train" and "{split}" not in listing and "split" not in of:
        raise unknown_split("image-table", split, ("train",))
    place = root or (file.parent if isinstance(file, Path) else file.rsplit("/", 1)[0])
    roles, names = tuple(of), tuple(of.values())
    values = ("test", "val") if split == "test" else (split,)
    listed = _collect(file, names, roles, place, values[:1] if _has(file, of, values[0]) else values[1:] or values)
    train = listed
    if split != "train":
        train = _collect(tables.split_file(listing, "train"), names, roles, place, ("train",))
    if not len(listed.files):
        raise ConfigError([f"{file}: lists no images"])
    return tables.build("image-table", split, place, listed, train, level, str(file))


def _collect(
    file: Path | str, names: tuple[str, ...], roles: tuple[str, ...], place: Path | str, splits: tuple[str, ...]
) -> tables.Listed:
    try:
        return tables.collect(_lines(file, names), roles, place, splits)
    except ConfigError as error:
        raise ConfigError([p if str(file) in p else f"{file}: {p}" for p in error.problems]) from error


def _lines(file: Path | str, names: tuple[str, ...]) -> tables.Iterator[tables.Line]:
    return tables.parquet_lines(file, names) if str(file).endswith(".parquet") else tables.csv_lines(file, names)


def _has(file: Path | str, of: dict[str, str], value: str) -> bool:
    """Whether the split column has the value; True without such a column."""
    return "split" not in of or any(cells == (value,) for _, cells in _lines(file, (of["split"],)))


def _columns(columns: tuple[str, ...]) -> dict[str, str]:
    """Column by role, in the order given."""
    of: dict[str, str] = {}
    for item in columns:
        role, equals, name = item.partition("=")
        if not equals or not name or role not in tables.ROLES:
            raise ConfigError([f"data.columns has {item!r}: give ROLE=COLUMN with a role of {', '.join(tables.ROLES)}"])
        if role == "attributes":
            of |= {f"attributes:{part}": part for part in name.split(",") if part}
        else:
            of[role] = name
    return {"path": "path"} | of


def _usual(file: Path | str) -> dict[str, str]:
    """The columns that are called as their roles."""
    if str(file).endswith(".parquet"):
        import pyarrow.parquet

        try:
            source = str(file) if isinstance(file, Path) else files.file_system(file).open(file, "rb")
            header = pyarrow.parquet.read_schema(source).names
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError([f"{file}: not a Parquet file ({error})"]) from error
    else:
        header = (files.read_lines(file) or [""])[0].split("\t" if str(file).endswith(".tsv") else ",")
    there = {name.strip().strip('"') for name in header}
    return {"path": "path"} | {role: role for role in ("label", "weak", "split") if role in there}
