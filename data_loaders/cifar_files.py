"""The Python batches of CIFAR-10, CIFAR-100 and downsampled ImageNet: pickles, opened without running code."""

from __future__ import annotations

import mmap
import pickle
import pickletools
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

_ALLOWED = {
    (module, name)
    for module, name in (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
    )
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which no image batch needs")
        return super().find_class(module, name)


def _check_memo(content: mmap.mmap) -> None:
    """Raises ValueError for a pickle that puts a thing at a place far beyond their number: Python fills all up to it."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(content)):  # type: ignore[arg-type]
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > number + 1:
            raise ValueError(f"puts a thing at place {argument} after {number} operations")


def read(root: Path | None, name: str, folder: str, file: str, first: int = 0, **labels: int) -> Mapping[str, Any]:
    """One batch file: ``data`` (N, 3072) uint8, and of each key in ``labels`` (N,) int64 of first..first+number-1.

    ``root`` holds ``folder``, or is it. Raises ConfigError naming what is missing, damaged or out of range.
    """
    if root is None:
        raise ConfigError([f"data.name = {name!r} needs its files: give --data.root, the folder that holds {folder}"])
    path = next((p for p in (root / folder / file, root / file) if p.is_file()), None)
    if path is None:
        raise ConfigError([f"data.name = {name!r}: no {file} in {root / folder}; give --data.root FOLDER"])
    try:
        # Mapped: whatever lengths it claims, no more than the file is ever read.
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_memo(content)
            content.seek(0)
            found = _Unpickler(content, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly anything
        raise ConfigError([f"{path}: cannot be read ({str(error)[:200]}); fetch it again"]) from error
    if not isinstance(found, dict) or "data" not in found:
        raise ConfigError([f"{path}: is no batch of images; fetch it again"])
    data = found["data"]
    whole = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not whole or data.nbytes > path.stat().st_size:  # more than the file: a few bytes that pretend to be many
        raise ConfigError([f"{path}: its images are not rows of 3 x 32 x 32 bytes; fetch it again"])
    batch: dict[str, Any] = {"data": data}
    for key, number in labels.items():
        batch[key] = _labels(path, found, key, len(data), first, number)
    return batch


def _labels(path: Path, found: Mapping[str, Any], key: str, rows: int, first: int, number: int) -> NDArray[np.int64]:
    values = found.get(key)
    if not isinstance(values, (list, np.ndarray)) or len(values) != rows:
        raise ConfigError([f"{path}: has not a label {key!r} for each of its {rows} images; fetch it again"])
    for row, value in enumerate(values):
        if not isinstance(value, (int, np.integer)) or not first <= value < first + number:
            raise ConfigError(
                [
                    f"{path}: row {row} has {key} {reprlib.repr(value)}, not one of {first}..{first + number - 1}; fetch "
                    "it again"
                ]
            )
    return np.asarray(values, dtype=np.int64)


def pixels(flat_NP: NDArray[np.uint8], side: int = 32) -> NDArray[np.uint8]:
    """(N, side, side, 3) of (N, 3 x side x side), channel after channel."""
    return np.ascontiguousarray(flat_NP.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
