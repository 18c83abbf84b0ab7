"""fashion-mnist: 70,000 Zalando articles, 28x28 gray, 10 classes (Xiao, Rasul, Vollgraf 2017), in idx files.

Looked for in ``root`` when it is given, else where Debian's package dataset-fashion-mnist puts them; what is missing is
downloaded with torchvision.
"""

from __future__ import annotations

import gzip
import math
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from . import ArraySet, check_labels, no_labels, unknown_split

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
"""Per split the files' prefix and the number of rows."""


def open_split(root: Path | None, split: str) -> ArraySet:
    """Raises ConfigError for an unknown split, and when the files are nowhere to be had or damaged."""
    if split not in SPLITS:
        raise unknown_split("fashion-mnist", split, tuple(SPLITS))
    prefix, rows = SPLITS[split]
    folder = _find(root, prefix) or _download(root, prefix)
    images = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte"), (rows, 28, 28))
    labels = _file(folder, f"{prefix}-labels-idx1-ubyte")
    label = check_labels(read_idx(labels, (rows,)).astype(np.int64), len(CLASSES), labels)
    return ArraySet(
        name="fashion-mnist",
        split=split,
        label=label,
        weak=no_labels(rows),
        classes=CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
        images=images[..., None],
    )


def read_idx(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The uint8 array of an idx file, gzipped or not: bytes 0 0 8 ndim, ndim big-endian uint32 sizes, the data.

    Raises ConfigError naming the file when it is not readable or not exactly an idx file of this shape.
    """
    start = 4 + 4 * len(shape)
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as packed:  # a little can unpack to more than fits: no more than it should be
                data = packed.read(start + math.prod(shape) + 1)
        else:
            data = file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError([f"{file}: cannot be read ({error}); fetch it again"]) from error
    if data[:4] != bytes((0, 0, 8, len(shape))) or len(data) < start:
        raise ConfigError([f"{file}: not an idx file of unsigned bytes in {len(shape)} dimensions; fetch it again"])
    found = tuple(int(size) for size in np.frombuffer(data, ">u4", len(shape), offset=4))
    if found != shape:
        raise ConfigError([f"{file}: holds an array of {found}, expected {shape}; is it another data set's?"])
    if len(data) != start + math.prod(shape):
        raise ConfigError([f"{file}: {len(data)} bytes, expected {start + math.prod(shape)}; fetch it again"])
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _file(folder: Path, stem: str) -> Path:
    plain = folder / stem
    return plain if plain.is_file() else folder / f"{stem}.gz"


def _find(root: Path | None, prefix: str) -> Path | None:
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    # A given root is meant: other data than asked for would be a surprise. Below "FashionMNIST" lie torchvision's files.
    places = [root] if root else [DEBIAN, _downloads()]
    for folder in [p for place in places for p in (place, place / "FashionMNIST" / "raw")]:
        if all(_file(folder, stem).is_file() for stem in stems):
            return folder
    return None


def _downloads() -> Path:
    return Path.home() / ".cache" / "raycon"


def _download(root: Path | None, prefix: str) -> Path:
    from torchvision.datasets import FashionMNIST

    from ..common import file_lock

    target = root or _downloads()
    try:
        # torchvision waits without a time limit: ask first whether the server answers at all.
        request = urllib.request.Request(FashionMNIST.mirrors[0] + FashionMNIST.resources[0][0], method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
        target.mkdir(parents=True, exist_ok=True)
        with file_lock(target / "FashionMNIST.lock"):
            FashionMNIST(str(target), download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; torchvision raises RuntimeError
        raise ConfigError(
            [
                f"Fashion-MNIST was not found in data.root = {str(root or '')!r} nor in {DEBIAN}, and the download "
                f"failed ({error}). Either install Debian's package (apt-get install dataset-fashion-mnist), or put "
                "the four idx files in a folder and give --data.root FOLDER, or run where there is internet: torchvision then downloads it"
            ]
        ) from error
    folder = _find(root, prefix)
    assert folder is not None, f"torchvision has changed its folder layout below {target}"
    return folder
