"""The data sets: a file in this folder *is* a registered data set (``fashion_mnist.py`` is ``fashion-mnist``).

Each file has one function ``open_split(root: Path | None, split: str) -> ImageSet``. Two kinds of ImageSet serve all
formats: ``ArraySet`` (small images of one size, held as one array) and ``FileSet`` (a file per image, any size).

Shape letters: N rows of the data set, B rows asked for, H W height and width in pixels, C channels (1 or 3).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import io
import os
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def names() -> list[str]:
    """The registered data sets."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def open_dataset(name: str, root: str | Path | None = None, split: str = "train") -> ImageSet:
    """The data set ``name``; ``root``: where its files are, None or empty for the usual places.

    Raises ConfigError for an unknown name (with the nearest one), an unknown split and missing or damaged files.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError([f"data.name = {name!r} is not a data set: {hint}there are {', '.join(names())}"])
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    dataset = module.open_split(Path(root).expanduser().absolute() if root else None, split)
    assert isinstance(dataset, ImageSet)
    return dataset


def unknown_split(name: str, split: str, known: tuple[str, ...]) -> ConfigError:
    return ConfigError([f"data set {name!r} has no split {split!r}: there are {', '.join(known)}"])


def no_labels(rows: int) -> NDArray[np.int64]:
    """(rows,) of -1: what ``label`` and ``weak`` hold where a data set has none."""
    return np.full(rows, -1, dtype=np.int64)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """The (H, W, 3) pixels of an encoded image file (JPEG, PNG, ...), as PIL's RGB; the EXIF rotation is not applied.

    Raises ValueError naming the image when it cannot be read to its end.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise ValueError(f"{name}: not a readable image ({error}); remove or replace the file") from error


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
        """The file of one image, None when it has none of its own."""
        return None

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
        return np.take(self.images, rows, axis=0)

    def read(self, row: int) -> NDArray[np.uint8]:
        return self.images[row]

    def _content(self) -> bytes:
        return hashlib.blake2b(np.ascontiguousarray(self.images).data).digest() + str(self.images.shape).encode()


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSet(ImageSet):
    """An image file per row, of any size, given as RGB."""

    root: Path
    files: NDArray[np.bytes_] = field(repr=False)
    """(N,) paths below ``root``, as the file system encodes them: one array, small and quick to pickle."""

    def __post_init__(self) -> None:
        assert len(self.files) == len(self.label) == len(self.weak)

    @property
    def image(self) -> None:
        return None

    def block(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        raise AssertionError(f"{self.name} has no fixed image size: use read()")

    def read(self, row: int) -> NDArray[np.uint8]:
        return decode(self.encoded(row), str(self.path(row)))

    def encoded(self, row: int) -> bytes:
        """The file of one image as it is. Raises ValueError naming it when it cannot be read."""
        try:
            return self.path(row).read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path(row)}: cannot be read ({error.strerror})") from error

    def stat(self, row: int) -> os.stat_result:
        """What the file system says of an image's file. Raises ValueError naming it when it is gone."""
        try:
            return os.stat(self.path(row))
        except OSError as error:
            raise ValueError(f"{self.path(row)}: cannot be read ({error.strerror})") from error

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.files[row])

    def _content(self) -> bytes:
        digest = hashlib.blake2b()
        for row, name in enumerate(self.files):
            found = self.stat(row)
            digest.update(b"%s\0%d\0%d\0" % (name, found.st_size, found.st_mtime_ns))
        return digest.digest()
