"""``panels.npz`` of a run directory: what the picture panels show, so that the page can be drawn again at once."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "panels.npz"
FORMAT = 1


@dataclass
class Panels:
    """The numbers and pictures of all panels; ``about`` is JSON, ``arrays`` are by name (see sample.py)."""

    about: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def save(panels: Panels, file: Path) -> Path:
    """Write ``panels.npz`` in one move: arrays, and ``about`` as JSON text."""
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    try:
        np.savez_compressed(temporary, about=np.array(json.dumps(panels.about)), **panels.arrays)  # type: ignore[arg-type]
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def load(file: Path) -> Panels:
    """Raises ValueError when the file is cut off, no ``panels.npz`` or of another format; nothing is unpickled."""
    try:
        with np.load(file, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            arrays = {name: data[name] for name in data.files if name != "about"}
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
        raise ValueError(f"{file} could not be read ({error}); delete it, the next report makes it again") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{file} is of another format; delete it, the next report makes it again")
    return Panels(about, arrays)
