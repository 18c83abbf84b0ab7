"""Images in shards: many to a file, each found by its place, so that any row is one small read wherever it lies.

A shard is an uncompressed tar (the layout of webdataset: the members of a sample follow each other and share the name up
to the first dot). What is where in it is found out once, by reading its headers, and kept in the cache under a name that
follows from the shard's size and time. Nothing is ever unpacked, so no name in an archive can lead anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from . import files, tables
from .datasets import IMAGENET_MEAN, IMAGENET_STD, FileSet, unknown_split
from .progress import progress

log = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "val", "valid", "validation"),
}
"""What the files of a split may be called."""
IMAGES = tuple(ending.decode().removeprefix(".") for ending in files.ENDINGS)
_FORM = 1
"""Of the kept indexes; another number and they are made anew."""
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NUMBERED = re.compile(r"(\d+)-of-(\d+)\.")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXT_BYTES = 1 << 20
"""Of a member that holds a label, at most."""
_GAP_BYTES = 1 << 16
"""Between two images of a shard at an address, up to which both come in one request."""
_STRETCH_BYTES = 1 << 24
"""Of a shard in one request, about."""
_MOST_SHARDS = 1_000_000


class Index(NamedTuple):
    """What is where in a shard: n images."""

    name: NDArray[np.bytes_]
    """(n,)."""
    start: NDArray[np.int64]
    """(n,) first byte of each image."""
    size: NDArray[np.int64]
    """(n,) bytes."""
    texts: dict[str, NDArray[np.bytes_]]
    """By role (label, weak) the n values as text, for the roles that the shard has."""


class Found(NamedTuple):
    """A file and how to tell whether it is still the same."""

    file: str
    """A path or an address."""
    name: str
    """Relative to the root."""
    size: int
    stamp: str
    """Of its time, or what a store gives instead."""

    @property
    def digest(self) -> str:
        text = "\0".join((str(_FORM), self.file, str(self.size), self.stamp))
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet(FileSet):
    """Images that lie in shards. ``files``: SHARD/MEMBER; ``file_bytes`` is always there."""

    shards: tuple[str, ...] = field(repr=False)
    """Paths or addresses."""
    shard: NDArray[np.int32] = field(repr=False)
    """(N,) in which of them each image is."""
    start: NDArray[np.int64] = field(repr=False)
    """(N,) its first byte there."""
    stamp: bytes = b""
    """Changes with the shards."""

    def encoded(self, row: int) -> bytes:
        """The file of one image as it is. Raises ValueError naming it when it cannot be read."""
        return self.encoded_many([row])[0]

    def encoded_many(self, rows: Sequence[int]) -> list[bytes]:
        """``encoded`` of several rows, in order."""
        assert self.file_bytes is not None
        wanted = np.asarray(rows, dtype=np.int64)
        places = [self.shards[i] for i in self.shard[wanted].tolist()]
        starts, sizes = self.start[wanted].tolist(), self.file_bytes[wanted].tolist()
        if files.is_remote(self.shards[0]):
            got = self._remote(wanted)
        else:
            got = [self._local(*args) for args in zip(rows, places, starts, sizes, strict=True)]
        for row, place, data, size in zip(rows, places, got, sizes, strict=True):
            if len(data) != size:
                raise ValueError(f"{self.where(row)}: cannot be read ({place} has been cut off meanwhile)")
        return got

    def _remote(self, wanted: NDArray[np.int64]) -> list[bytes]:
        """Images that lie beside each other in one request: rows in order take whole stretches of a shard at once."""
        assert self.file_bytes is not None
        order = np.lexsort((self.start[wanted], self.shard[wanted]))
        rows = wanted[order]
        shard, start, end = self.shard[rows], self.start[rows], self.start[rows] + self.file_bytes[rows]
        apart = (np.diff(shard) != 0) | (start[1:] - end[:-1] > _GAP_BYTES)
        stretch = np.concatenate([[0], np.cumsum(apart | (np.diff(start // _STRETCH_BYTES) != 0))])
        first = np.flatnonzero(np.diff(stretch, prepend=-1))
        last = np.append(first[1:], len(rows)) - 1
        begin = start[first]
        places = [self.shards[i] for i in shard[first].tolist()]
        parts = self._fetched(rows[first].tolist(), places, begin.tolist(), end[last].tolist())
        got = [b""] * len(rows)
        for at, part, a, b in zip(order.tolist(), stretch.tolist(), start.tolist(), end.tolist(), strict=True):
            got[at] = parts[part][a - int(begin[part]) : b - int(begin[part])]
        return got

    def _local(self, row: int, place: str, start: int, size: int) -> bytes:
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, size, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            hint = "" if self.where(row).startswith(place) else "; data.cache must be a folder that every node sees"
            raise ValueError(f"{self.where(row)}: cannot be read ({place}: {error.strerror or error}{hint})") from error

    def stats(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(N,) bytes of each image, and zeros: the times of the shards are in the fingerprint."""
        assert self.file_bytes is not None
        return self.file_bytes, np.zeros_like(self.file_bytes)

    def path(self, row: int) -> None:
        return None

    def _content(self) -> bytes:
        digest = hashlib.blake2b(self.stamp)
        for part in (self.files, self.shard, self.start, self.file_bytes):
            digest.update(np.ascontiguousarray(part).data)
        return digest.digest()


# --- which files ------------------------------------------------------------------------------------------------


def find(name: str, root: Path | str, split: str, listing: str, ending: str) -> list[Found]:
    """The shards of a split, in the order of their names.

    listing: a pattern below ``root`` with {split}, {000..123} and *; empty: SPLIT/*.tar, SPLIT-*.tar, for train also all
    that belong to no other split. Raises ConfigError when there are none, or some of a numbered series are missing.
    """
    if split not in SPLITS:
        raise unknown_split(name, split, tuple(SPLITS))
    if not files.is_folder(root):
        raise ConfigError([f"data.root = '{root}' is not a folder: give the folder that holds the shards"])
    words = SPLITS[split] if not listing or "{split}" in listing else ("",)
    usual = [listing] if listing else [f"{{split}}/*{ending}", f"{{split}}[-_.]*{ending}"]
    tried = [pattern.replace("{split}", word) for word in words for pattern in usual]
    found: list[Found] = []
    for pattern in tried:
        found = found or [one for part in _expanded(pattern) for one in _matching(root, part, ending)]
    if not found and split == "train" and not listing:
        others = tuple(word for known in SPLITS.values() for word in known)
        found = [one for one in _matching(root, f"*{ending}", ending) if not one.name.startswith(others)]
    if not found:
        raise ConfigError(
            [f"data.root = '{root}' has no {' or '.join(tried)}; say which files: --data.listing PATTERN"]
        )
    _whole_series(found, root)
    return found


def _expanded(pattern: str) -> Iterator[str]:
    """{000..123} counted out, as shells do it."""
    if (match := _RANGE.search(pattern)) is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + _MOST_SHARDS:
        raise ConfigError(
            [f"data.listing: {match[0]} counts from {first} to {last}; give a first and a larger last number"]
        )
    for number in range(first, last + 1):
        yield from _expanded(f"{pattern[: match.start()]}{number:0{len(match[1])}}{pattern[match.end() :]}")


def _matching(root: Path | str, pattern: str, ending: str) -> list[Found]:
    if pattern.startswith("/") or ".." in pattern.split("/") or files.is_remote(pattern):
        raise ConfigError([f"data.listing has {pattern!r}: give a pattern of files below data.root = '{root}'"])
    exact = not any(letter in pattern for letter in "*?[")
    if isinstance(root, Path):
        paths = [root / pattern] if exact else sorted(p for p in root.glob(pattern) if not p.name.startswith("."))
        try:
            stats = [(path, path.stat()) for path in paths]
        except OSError as error:
            raise ConfigError([f"data.listing: {error.filename}: {error.strerror}"]) from error
        found = [Found(str(p), str(p.relative_to(root)), s.st_size, str(s.st_mtime_ns)) for p, s in stats]
    else:
        system = files.file_system(root)
        base = system._strip_protocol(root).rstrip("/")
        try:
            there = {p: system.info(p) for p in [f"{base}/{pattern}"]} if exact else None
            infos = sorted((there or system.glob(f"{base}/{pattern}", detail=True)).items())
        except OSError as error:
            raise ConfigError(
                [f"data.listing: {root}/{pattern}: {getattr(error, 'strerror', None) or error}"]
            ) from error
        found = [
            Found(f"{root}/{p[len(base) + 1 :]}", p[len(base) + 1 :], int(info["size"]), _stamp(info))
            for p, info in infos
        ]
    if wrong := [one.name for one in found if not one.name.endswith(ending)]:
        hint = "; an archive must not be compressed: gunzip it" if ending == ".tar" else ""
        raise ConfigError([f"{root}/{wrong[0]}: its name does not end with {ending}{hint}"])
    return found


def _stamp(info: dict[str, Any]) -> str:
    known = ("ETag", "etag", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
    return next((str(info[name]) for name in known if info.get(name)), "")


def _whole_series(found: list[Found], root: Path | str) -> None:
    """Raises ConfigError when files are numbered, 3-of-8, and one of them is not there."""
    series: dict[tuple[str, int], set[int]] = {}
    for one in found:
        if match := _NUMBERED.search(one.name):
            series.setdefault((one.name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (prefix, number), there in series.items():
        first = min(there) if min(there) in (0, 1) else 0
        if gone := sorted(set(range(first, first + min(number, _MOST_SHARDS))) - there):
            raise ConfigError(
                [f"{root}: of the {number} files {prefix}*-of-{number} number {gone[0]} is missing; fetch it"]
            )


# --- what is in them --------------------------------------------------------------------------------------------


def roles_of(columns: tuple[str, ...], known: tuple[str, ...]) -> dict[str, str]:
    """ROLE=VALUE items. Raises ConfigError for others."""
    of: dict[str, str] = {}
    for item in columns:
        role, equals, value = item.partition("=")
        if not equals or not value or role not in known:
            raise ConfigError([f"data.columns has {item!r}: give ROLE=WHERE with a role of {', '.join(known)}"])
        of[role] = value
    return of


def indexes(
    shards: list[Found],
    roles: dict[str, str],
    cache: Path,
    make: Callable[[Found], Index],
    copy: Callable[[Found], Path] | None = None,
) -> list[Index]:
    """The index of each shard, from the cache where it is known. copy: a file that ``make`` leaves as well.

    What is done stays done when it is stopped. Raises ConfigError naming what is wrong.
    """
    from .common import file_lock

    def known(one: Found) -> Index | None:
        return None if copy is not None and not copy(one).exists() else _load(kept(cache, one, roles))

    def one_of(one: Found) -> Index:
        index = known(one)
        if index is None:
            index = make(one)
            _save(kept(cache, one, roles), index)
        return index

    found = [known(one) for one in shards]
    if any(index is None for index in found):
        folder = cache / "shards"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            log.info("finding out what is in %d shards", len(shards))
            with file_lock(folder / f"{shards[0].digest}.lock"), progress("shards read", len(shards)) as tell:
                pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))))
                try:
                    for i, index in enumerate(pool.map(one_of, shards)):
                        found[i] = index
                        tell(i + 1)
                finally:
                    pool.shutdown(cancel_futures=True)
        except OSError as error:
            raise ConfigError(
                [f"data.cache: cannot write into {folder} ({error}); give a folder with room in it"]
            ) from error
    return [index for index in found if index is not None]


def kept(cache: Path, one: Found, roles: dict[str, str]) -> Path:
    """Where the index of a shard is kept; the name follows from the shard's name, size and time and from ``roles``."""
    named = hashlib.blake2b(json.dumps(roles, sort_keys=True).encode(), digest_size=4).hexdigest()
    return cache / "shards" / f"{Path(one.name).stem[:60]}-{one.digest}-{named}.npz"


def _save(file: Path, index: Index) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as out:
        texts: dict[str, Any] = {f"text:{role}": values for role, values in index.texts.items()}
        np.savez_compressed(out, name=index.name, start=index.start, size=index.size, **texts)
    os.replace(part, file)


def _load(file: Path) -> Index | None:
    try:
        with np.load(file, allow_pickle=False) as data:
            texts = {key.removeprefix("text:"): data[key] for key in data.files if key.startswith("text:")}
            return Index(data["name"], data["start"], data["size"], texts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def scan_tar(shard: Found, roles: dict[str, str]) -> Index:
    """What is in a tar, by its headers. roles: by image, label, weak the extension of the member that has it, for a label
    also EXTENSION:FIELD (JSON) or folder. Raises ConfigError naming the archive and the sample that is wrong."""
    names, starts, sizes = [], [], []
    texts: dict[str, list[bytes]] = {role: [] for role in ("label", "weak")}
    try:
        with _opened(shard.file) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for key, members in _samples(tar, shard.file):
                image = _image(members, key, shard.file, roles.get("image", ""))
                names.append(image.name.encode("utf-8", "surrogateescape"))
                starts.append(image.offset_data)
                sizes.append(image.size)
                for role in texts:
                    value = _text(tar, members, key, shard.file, role, roles)
                    if value is not None:
                        texts[role].append(value)
            handle.seek(tar.offset)
            if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ConfigError([f"{shard.file}: does not end as an archive does: it is cut off; fetch it again"])
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{shard.file}: not a whole uncompressed tar ({error}); fetch it again"]) from error
    if not names:
        raise ConfigError([f"{shard.file}: holds no images ({', '.join(IMAGES)})"])
    for role, values in texts.items():
        if values and len(values) != len(names):
            raise ConfigError([f"{shard.file}: only {len(values)} of {len(names)} samples have a {role}; mend it"])
    found = {role: np.array(values, dtype=np.bytes_) for role, values in texts.items() if values}
    return Index(np.array(names, dtype=np.bytes_), np.array(starts, np.int64), np.array(sizes, np.int64), found)


def _opened(file: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if files.is_remote(file):
        opened: contextlib.AbstractContextManager[IO[bytes]] = files.file_system(file).open(file, "rb")
        return opened
    return open(file, "rb")


def _samples(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(name, members by extension) of consecutive members that share the name up to its first dot."""
    key = ""
    members: dict[str, tarfile.TarInfo] = {}
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
        match = _SAMPLE.fullmatch(member.name)
        if member.isdir() or match is None:  # hidden files, and such without an extension
            continue
        if not member.isreg() or member.issparse():
            raise ConfigError([f"{where}: {member.name!r} is a link or another special file; pack plain files"])
        if match[1] != key:
            if members:
                yield key, members
            key, members = match[1], {}
        extension = match[2].lower()
        if extension in members:
            raise ConfigError([f"{where}: {member.name!r} is in it twice; mend it"])
        members[extension] = member
    if members:
        yield key, members


def _image(members: dict[str, tarfile.TarInfo], key: str, where: str, wanted: str) -> tarfile.TarInfo:
    images = [wanted] if wanted in members else [e for e in members if e in IMAGES and not wanted]
    if len(images) != 1:
        has = f"has {len(images)} images" if images else f"has no image ({', '.join(sorted(members))})"
        raise ConfigError(
            [
                f"{where}: sample {key!r} {has}; the members of a sample must follow each other (tar --sort=name), and "
                "--data.columns image=EXTENSION says which of several"
            ]
        )
    return members[images[0]]


def _text(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], key: str, where: str, role: str, roles: dict[str, str]
) -> bytes | None:
    """The value of a role as text; None where it is not asked for. Without labels in ``roles`` they are in .cls if that is there."""
    place = roles.get(role, "cls" if role == "label" and not {"label", "weak"} & roles.keys() else "")
    if not place:
        return None
    if place == "folder":
        return key.rpartition("/")[0].rpartition("/")[2].encode("utf-8", "surrogateescape")
    extension, _, name = place.partition(":")
    if extension not in members:
        if role not in roles:
            return None
        raise ConfigError([f"{where}: sample {key!r} has no .{extension} for its {role}; mend it"])
    member = members[extension]
    if member.size > _TEXT_BYTES:
        raise ConfigError([f"{where}: {member.name!r} has {member.size} bytes: too many for a {role}"])
    data = tar.fileobj  # type: ignore[attr-defined]
    data.seek(member.offset_data)
    content: bytes = data.read(member.size)
    if name:
        try:
            content = str(json.loads(content)[name]).encode()
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                [f"{where}: {member.name!r} is no JSON with a field {name!r} ({error}); mend it"]
            ) from error
    if not (content := content.strip()) or b"\0" in content or b"\n" in content:
        raise ConfigError([f"{where}: {member.name!r} is no {role}, a line of text; mend it"])
    return content


def listed(shards: list[Found], found: list[Index]) -> tables.Listed:
    """All shards as one list. Raises ConfigError when only some have labels."""
    columns: dict[str, tables.Values] = {}
    for role in ("label", "weak"):
        without = [one.file for one, index in zip(shards, found, strict=True) if role not in index.texts]
        if len(without) == len(shards):
            continue
        if without:
            raise ConfigError([f"{without[0]}: has no {role}, others have one; mend it, or leave it out"])
        columns[role] = tables.Values()
        for index in found:
            for text in index.texts[role].tolist():
                columns[role].add(text.decode("utf-8", "replace"))
    groups = [files.Group(os.fsencode(one.name), index.name, None) for one, index in zip(shards, found, strict=True)]
    return tables.Listed(files.join(groups)[0], columns)


def build(
    name: str,
    split: str,
    root: Path | str,
    shards: list[Found],
    found: list[Index],
    train: tuple[list[Found], list[Index]],
    places: Sequence[Path] = (),
    names: dict[str, tuple[str, ...]] | None = None,
) -> ShardSet:
    """The data set. places: where the shards' bytes are, when not in the shards themselves; names: see labelled."""
    mine = listed(shards, found)
    theirs = mine if train[0] is shards else listed(*train)
    stamp = hashlib.blake2b("".join(one.digest for one in shards).encode()).digest()
    made = ShardSet(
        name=name, split=split, root=root, files=mine.files, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        file_bytes=np.concatenate([index.size for index in found]),
        shards=tuple(map(str, places)) if places else tuple(one.file for one in shards),
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.size) for index in found]),
        start=np.concatenate([index.start for index in found]),
        stamp=stamp,
        **tables.labelled(mine, theirs, "", str(root), names),
    )  # fmt: skip
    tables.warn(made, str(root))
    return made
