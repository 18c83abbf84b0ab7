"""The data sets: a file in this folder *is* a registered data set (``fashion_mnist.py`` is ``fashion-mnist``).

Each file has one function ``open_split(root: Path | None, split: str) -> ImageSet``; those of ``OPTIONS`` that it also
takes are options of that data set. With ``REMOTE = True`` in the file a root may also be a URL (a str), which fsspec
opens. Two kinds of ImageSet serve all formats: ``ArraySet`` (small images of one size, held as one array) and
``FileSet`` (a file per image, any size).

Shape letters: N rows of the data set, B rows asked for, H W height and width in pixels, C channels (1 or 3), T labels
of an image that can have several, A attributes.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import logging
import os
import pkgutil
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from raycon.core.config import ConfigError, DataConfig

from ..files import file_system, is_remote, local_stats

log = logging.getLogger(__name__)

OPTIONS = ("listing", "columns", "level")
"""Options of ``DataConfig`` that a reader may take."""
DEFAULT_CACHE = Path.home() / ".cache" / "raycon"
"""Where a data set that is opened without a ``data.cache`` keeps what it finds out once."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
"""What PIL raises for images that are not whole."""
PER_ROW = ("label", "weak", "targets", "attributes", "images", "files", "file_bytes", "shard", "start")
"""The arrays of an ImageSet that have an entry per row."""


def names() -> list[str]:
    """The registered data sets."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def about(name: str) -> str:
    """The first line of a data set's description, found without importing anything."""
    file = Path(__file__).parent / f"{name.replace('-', '_')}.py"
    return file.read_text(encoding="utf-8").split('"""', 2)[1].strip().splitlines()[0]


def open_config(data: DataConfig, split: str = "train") -> ImageSet:
    """The data set that a configuration names, unreadable images left out when ``data.on_error`` is skip, its images
    kept decoded when ``data.decode`` is once.

    Raises ConfigError as ``open_dataset`` does.
    """
    cache = Path(data.cache) if data.cache else DEFAULT_CACHE
    dataset = open_dataset(
        data.name, data.root, split, listing=data.listing, columns=data.columns, level=data.level, cache=cache
    )
    if data.on_error == "skip" and isinstance(dataset, FileSet):
        from ..readable import readable_only

        dataset = readable_only(dataset, cache)
    if data.decode == "once":
        from ..decoded import decode_once

        return decode_once(dataset, cache)
    return dataset


def open_dataset(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    *,
    listing: str = "",
    columns: Sequence[str] = (),
    level: str = "",
    cache: Path | None = None,
) -> ImageSet:
    """The data set ``name``; ``root``: where its files are, None or empty for the usual places.

    listing, columns, level: see DataConfig; one that the data set does not have is warned about. cache: a folder for
    what a reader finds out once (what is where in a shard); None: ``DEFAULT_CACHE``. Raises ConfigError for
    an unknown name (with the nearest one), an unknown split and missing or damaged files.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError([f"data.name = {name!r} is not a data set: {hint}there are {', '.join(names())}"])
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    place: Path | str | None = Path(root).expanduser().absolute() if root and not is_remote(root) else None
    if root and is_remote(root):
        if not getattr(module, "REMOTE", False):
            raise ConfigError(
                [
                    f"data.root = {str(root)!r}: {name} is read from a local folder only; copy it, or write a list of its "
                    "images and read that with data.name = image-list"
                ]
            )
        place = str(root).rstrip("/")
    known = inspect.signature(module.open_split).parameters
    options: dict[str, Any] = {}
    for option, value in zip(OPTIONS, (listing, tuple(columns), level), strict=True):
        if option in known:
            options[option] = value
        elif value:
            log.warning("data.%s = %r has no effect: %s has no such option", option, value, name)
    if "cache" in known:
        options["cache"] = cache or DEFAULT_CACHE
    dataset = module.open_split(place, split, **options)
    assert isinstance(dataset, ImageSet)
    if not len(dataset):
        raise ConfigError([f"data.name = {name!r}, split {split!r}: no images; is data.root = '{root or ''}' right?"])
    return dataset


def unknown_split(name: str, split: str, known: tuple[str, ...]) -> ConfigError:
    return ConfigError([f"data set {name!r} has no split {split!r}: there are {', '.join(known)}"])


def need_root(name: str, root: Path | None, what: str) -> Path:
    """``root`` if it is given. Raises ConfigError saying that it must hold ``what``."""
    if root is None:
        raise ConfigError([f"data.name = {name!r} needs its files: give --data.root, the folder that holds {what}"])
    return root


def first_folder(name: str, root: Path | None, *inside: str) -> Path:
    """The first of the folders ``root / inside`` that is there. Raises ConfigError naming where was looked."""
    base = need_root(name, root, inside[0])
    for place in (base / part for part in inside):
        if place.is_dir():
            return place
    raise ConfigError([f"data.name = {name!r}: no folder {inside[0]} in data.root = '{base}'; give --data.root FOLDER"])


def check_labels(label: NDArray[np.int64], classes: int, where: object) -> NDArray[np.int64]:
    """``label`` if all are 0..classes-1. Raises ConfigError naming the first that is not and its row."""
    if len(wrong := np.flatnonzero((label < 0) | (label >= classes))):
        row = int(wrong[0])
        raise ConfigError([f"{where}: row {row} has label {label[row]}, not one of 0..{classes - 1}; fetch it again"])
    return label


def no_labels(rows: int) -> NDArray[np.int64]:
    """(rows,) of -1: what ``label`` and ``weak`` hold where a data set has none."""
    return np.full(rows, -1, dtype=np.int64)


def only_label(targets_NT: NDArray[np.int8]) -> NDArray[np.int64]:
    """(N,) the class of an image that certainly has one and no other, else -1."""
    one = (targets_NT == 1).sum(axis=1) == 1
    return np.where(one & ~(targets_NT == 0).any(axis=1), np.argmax(targets_NT, axis=1), -1).astype(np.int64)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """The (H, W, 3) pixels of an encoded image file (JPEG, PNG, ...), as PIL's RGB; the EXIF rotation is not applied.

    Raises ValueError naming the image when it cannot be read to its end.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image ({damage(error)}); remove or replace the file") from error


def damage(error: Exception) -> str:
    """What is wrong with an image that PIL refused, in a line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet(ABC):
    """N images with labels. Cheap to pickle for what it holds: arrays, never one Python object per image."""

    name: str
    split: str
    label: NDArray[np.int64]
    """(N,) fine labels, what evaluations score; -1 where there is none."""
    weak: NDArray[np.int64]
    """(N,) weak / coarse labels, what a method may train with; -1 where there is none."""
    classes: tuple[str, ...] = ()
    weak_classes: tuple[str, ...] = ()
    mean: tuple[float, ...]
    """Per channel, of pixels in 0..1; its length is C."""
    std: tuple[float, ...]
    targets: NDArray[np.int8] | None = field(default=None, repr=False)
    """(N, T) where an image can have several labels (then named by ``classes``): 1 yes, -1 no, 0 not to be counted."""
    attributes: NDArray[np.int64] | None = field(default=None, repr=False)
    """(N, A) values of attributes, each numbered from 0."""
    attribute_names: tuple[str, ...] = ()
    annotations: str = ""
    """The file or folder of the objects' boxes and masks, where there is one."""
    dropped: int = 0
    """Unreadable images that were left out."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    @abstractmethod
    def image(self) -> tuple[int, int, int] | None:
        """(C, H, W) when all images have one size and ``block`` works; else None."""

    @abstractmethod
    def block(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(B, H, W, C) of a fixed-size set, in the order of ``rows``."""

    @abstractmethod
    def read(self, row: int) -> NDArray[np.uint8]:
        """(H, W, C) of one image."""

    def path(self, row: int) -> Path | None:
        """The local file of one image, None when it has none of its own."""
        return None

    def where(self, row: int) -> str:
        """How an image is named in messages: its file or address."""
        return f"{self.name} {self.split} row {row}"

    def subset(self, rows: NDArray[np.int64], **changed: Any) -> Self:
        """The data set of these rows, in this order, numbered from 0."""
        arrays = {name: getattr(self, name, None) for name in PER_ROW}
        return dataclasses.replace(self, **{k: v[rows] for k, v in arrays.items() if v is not None}, **changed)

    @abstractmethod
    def _content(self) -> bytes:
        """A digest of the pixels or of what stands for them."""

    @cached_property
    def fingerprint(self) -> str:
        """Names converted copies of this data: changes when images, order or labels change."""
        digest = hashlib.blake2b(self._content(), digest_size=8)
        digest.update(self.label.tobytes())
        digest.update(self.weak.tobytes())
        return f"{self.name}-{self.split}-{digest.hexdigest()}"


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySet(ImageSet):
    """Images of one size in one uint8 array (or memory map)."""

    images: NDArray[np.uint8] = field(repr=False)
    """(N, H, W, C)."""

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8, self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert len(self.images) == len(self.label) == len(self.weak)
        assert len(self.mean) == len(self.std) == self.images.shape[3]

    @property
    def image(self) -> tuple[int, int, int]:
        _, height, width, channels = self.images.shape
        return channels, height, width

    def block(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        if not self.images.flags.c_contiguous:  # np.take would copy all of it first
            return self.images[rows]
        return np.take(self.images, rows, axis=0)

    def read(self, row: int) -> NDArray[np.uint8]:
        return self.images[row]

    def _content(self) -> bytes:
        digest = hashlib.blake2b()
        for first in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self.images[first : first + 4096]).data)
        return digest.digest() + str(self.images.shape).encode()


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSet(ImageSet):
    """An image file per row, of any size, given as RGB."""

    root: Path | str
    """A folder; or an address that fsspec opens (s3://..., gs://...)."""
    files: NDArray[np.bytes_] = field(repr=False)
    """(N,) paths below ``root``, as the file system encodes them: one array, small and quick to pickle."""
    file_bytes: NDArray[np.int64] | None = field(default=None, repr=False)
    """(N,) sizes of remote files, where the listing told them."""

    def __post_init__(self) -> None:
        assert len(self.files) == len(self.label) == len(self.weak)

    @property
    def image(self) -> None:
        return None

    def block(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        raise AssertionError(f"{self.name} has no fixed image size: use read()")

    def read(self, row: int) -> NDArray[np.uint8]:
        return decode(self.encoded(row), self.where(row))

    def encoded(self, row: int) -> bytes:
        """The file of one image as it is. Raises ValueError naming it when it cannot be read."""
        try:
            if isinstance(self.root, Path):
                with open(os.path.join(os.fsencode(self.root), self.files[row]), "rb") as handle:
                    return handle.read()
            data = file_system(self.root).cat_file(self.where(row))
            assert isinstance(data, bytes)
            return data
        except OSError as error:
            raise ValueError(f"{self.where(row)}: cannot be read ({error.strerror or error})") from error

    def encoded_many(self, rows: Sequence[int]) -> list[bytes]:
        """``encoded`` of several rows in order; from an address at once, so that a row does not wait for the last one."""
        if isinstance(self.root, Path):
            return [self.encoded(row) for row in rows]
        return self._fetched(rows, [self.where(row) for row in rows], None, None)

    def _fetched(
        self, rows: Sequence[int], addresses: list[str], starts: list[int] | None, ends: list[int] | None
    ) -> list[bytes]:
        """Bytes of files at addresses, whole ones or from start to end."""
        assert isinstance(self.root, str)
        got = file_system(self.root).cat_ranges(addresses, starts, ends, on_error="return")
        for row, data in zip(rows, got, strict=True):
            if isinstance(data, OSError):
                raise ValueError(f"{self.where(row)}: cannot be read ({data.strerror or data})") from data
            if isinstance(data, Exception):
                raise data
        return list(got)

    def sizes(self) -> NDArray[np.int64]:
        """(N,) bytes of each file. Raises ValueError naming one that is gone."""
        return self._checked(self.stats()[0])

    def stats(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(N,) bytes of each file, -1 for one that is gone, and (N,) when it was changed (ns; 0 for remote files)."""
        if isinstance(self.root, Path):
            return local_stats(os.fsencode(self.root), self.files)
        if self.file_bytes is not None:
            return self.file_bytes, np.zeros_like(self.file_bytes)
        system = file_system(self.root)
        size = [-1 if size is None else size for size in system.sizes([self.where(row) for row in range(len(self))])]
        return np.array(size, dtype=np.int64), np.zeros(len(self), dtype=np.int64)

    def path(self, row: int) -> Path | None:
        return self.root / os.fsdecode(self.files[row]) if isinstance(self.root, Path) else None

    def where(self, row: int) -> str:
        return f"{self.root}/{os.fsdecode(self.files[row])}"

    def _content(self) -> bytes:
        size, changed = self.stats()
        digest = hashlib.blake2b(str(self.root).encode() if is_remote(self.root) else b"")
        for part in (self.files, self._checked(size), changed):
            digest.update(np.ascontiguousarray(part).data)
        return digest.digest()

    def _checked(self, size: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(gone := np.flatnonzero(size < 0)):
            more = f", nor can {len(gone) - 1} more" if len(gone) > 1 else ""
            raise ValueError(
                f"{self.where(int(gone[0]))}: cannot be read (no such file){more}; bring back what is missing, or give "
                "--data.on-error skip"
            )
        return size
