"""cars196: Stanford Cars, 16,185 photographs of 196 models (Krause et al. 2013), with MaskCon's 8 body types.

Files as torchvision places them: stanford_cars/{cars_train, cars_test, devkit/cars_train_annos.mat,
cars_test_annos_withlabels.mat}. Reading the annotations needs scipy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raycon.core.config import ConfigError

from .. import coarse
from ..files import below
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet, check_labels, unknown_split

SPLITS = {
    "train": ("devkit/cars_train_annos.mat", "cars_train"),
    "test": ("cars_test_annos_withlabels.mat", "cars_test"),
}
BODIES = ("pickup", "sedan", "SUV", "convertible", "coupe", "hatchback", "wagon", "van")


def open_split(root: Path | None, split: str) -> FileSet:
    """Raises ConfigError for an unknown split, missing files, and without scipy."""
    if split not in SPLITS:
        raise unknown_split("cars196", split, tuple(SPLITS))
    annotations, images = SPLITS[split]
    if root is None:
        raise ConfigError(
            ["data.name = 'cars196' needs its files: give --data.root, the folder that holds stanford_cars"]
        )
    base = root / "stanford_cars" if (root / "stanford_cars").is_dir() else root
    try:
        from scipy.io import loadmat

        found = loadmat(base / annotations, squeeze_me=True)["annotations"]
        number = np.atleast_1d(found["class"]).astype(np.int64)
        given = [str(name) for name in np.atleast_1d(found["fname"])]
    except ImportError:
        raise ConfigError(["data.name = 'cars196': its annotations need scipy; pip install scipy"]) from None
    except Exception as error:  # scipy raises a dozen kinds for a damaged file
        raise ConfigError(
            [f"{base / annotations}: cannot be read ({error}); see the file's head for the layout"]
        ) from error
    label = check_labels(number - 1, 196, f"{base / annotations} (minus 1)")
    names = [below(name, base / images, str(base / annotations)) for name in given]
    return FileSet(
        name="cars196",
        split=split,
        label=label,
        weak=coarse.cars196()[label],
        classes=tuple(f"model {i}" for i in range(196)),
        weak_classes=BODIES,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        root=base / images,
        files=np.array(names, dtype=np.bytes_),
    )
