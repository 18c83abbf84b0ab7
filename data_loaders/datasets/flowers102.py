"""flowers102: Oxford Flowers, 8,189 photographs of 102 kinds (Nilsback, Zisserman 2008).

flowers-102/{jpg/image_*.jpg, imagelabels.mat, setid.mat}: trnid and valid of 1,020 images each, tstid of 6,149. Reading
them needs scipy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, check_labels, first_folder, no_labels, unknown_split

SPLITS = {"train": ("trnid",), "val": ("valid",), "trainval": ("trnid", "valid"), "test": ("tstid",)}
CLASSES = 102


def open_split(root: Path | None, split: str) -> FileSet:
    """``root`` holds flowers-102, or is it; trainval is train, then val. Raises ConfigError, also without scipy."""
    if split not in SPLITS:
        raise unknown_split("flowers102", split, tuple(SPLITS))
    base = first_folder("flowers102", root, "flowers-102", "")
    try:
        from scipy.io import loadmat

        labels = np.atleast_1d(loadmat(base / "imagelabels.mat", squeeze_me=True)["labels"]).astype(np.int64)
        sets = loadmat(base / "setid.mat", squeeze_me=True)
        image = np.concatenate([np.atleast_1d(sets[part]).astype(np.int64) for part in SPLITS[split]])
    except ImportError:
        raise ConfigError(["data.name = 'flowers102': its labels need scipy; pip install scipy"]) from None
    except Exception as error:  # scipy raises a dozen kinds for a damaged file
        raise ConfigError([f"{base}: imagelabels.mat or setid.mat cannot be read ({error}); fetch it again"]) from error
    if image.min(initial=1) < 1 or image.max(initial=1) > len(labels):
        raise ConfigError([f"{base}/setid.mat: an image outside 1..{len(labels)}; fetch it again"])
    label = check_labels(labels[image - 1] - 1, CLASSES, f"{base}/imagelabels.mat (minus 1)")
    return FileSet(
        name="flowers102",
        split=split,
        label=label,
        weak=no_labels(len(label)),
        classes=tuple(f"flower {i + 1}" for i in range(CLASSES)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / "jpg",
        files=np.array([f"image_{i:05d}.jpg".encode() for i in image], dtype=np.bytes_),
    )
