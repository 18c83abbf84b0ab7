"""sop-split2: Stanford Online Products as MaskCon splits it (2 of 2). See data_loaders/sop.py."""

from __future__ import annotations

from pathlib import Path

from .. import sop
from . import FileSet


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds bicycle_final and the others. Raises ConfigError for an unknown split and without it."""
    return sop.open_number(2, root, split)
