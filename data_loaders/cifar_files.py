"""The Python batches of CIFAR-10, CIFAR-100 and downsampled ImageNet: pickles, opened without running code."""

from __future__ import annotations

import pickle
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


def read(root: Path | None, name: str, folder: str, file: str) -> Mapping[str, Any]:
    """One batch file, keys as text. ``root`` holds ``folder``, or is it. Raises ConfigError naming what is missing."""
    if root is None:
        raise ConfigError([f"data.name = {name!r} needs its files: give --data.root, the folder that holds {folder}"])
    path = next((p for p in (root / folder / file, root / file) if p.is_file()), None)
    if path is None:
        raise ConfigError([f"data.name = {name!r}: no {file} in {root / folder}; give --data.root FOLDER"])
    try:
        with path.open("rb") as handle:
            found = _Unpickler(handle, encoding="latin1").load()
    except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); fetch it again"]) from error
    if not isinstance(found, dict) or "data" not in found:
        raise ConfigError([f"{path}: is no batch of images; fetch it again"])
    return found


def pixels(flat_NP: Any, side: int = 32) -> NDArray[np.uint8]:
    """(N, side, side, 3) of (N, 3 x side x side), channel after channel."""
    flat = np.asarray(flat_NP, dtype=np.uint8).reshape(-1, 3, side, side)
    return np.ascontiguousarray(flat.transpose(0, 2, 3, 1))
