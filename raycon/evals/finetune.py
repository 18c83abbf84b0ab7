"""Fine-tuning of the whole network: with all labels, or semi-supervised with few.

Which images keep their labels: a list file, or class-balanced rows drawn from the seed. Shape letter: N train rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core import stream
from raycon.core.config import ConfigError, EvalConfig
from raycon.evals import sgd
from raycon.evals.base import Source
from raycon.evals.protocols import FINETUNE


class Evaluation:
    """Percent of test images right after training encoder and classifier on some of train: "finetune/top1",
    "finetune/top5" (with more than 5 classes) and "finetune/labels", the number of labelled images used.

    Weights of the last epoch; test is looked at once. The preset says how many labels and which training.
    """

    def __init__(self, config: EvalConfig, seed: int = 0, preset: str = "") -> None:
        self.training, self.percent = FINETUNE[preset]
        self.epochs, self.seed, self.list = config.epochs, seed, config.label_list

    def problems(self) -> list[str]:
        """What would keep it from starting."""
        if self.list and not Path(self.list).is_file():
            return [f"evals.label_list = {self.list!r}: no such file"]
        return []

    def run_on(self, source: Source) -> dict[str, float]:
        if self.list:
            rows = listed(Path(self.list), source.train)
        else:
            rows = balanced(np.asarray(source.train.label), self.percent, self.seed)
        numbers = sgd.on_images(self.training, source, self.epochs, self.seed, rows)
        return {f"finetune/{name}": value for name, value in numbers.items()} | {"finetune/labels": float(len(rows))}


def preset(config: EvalConfig, seed: int, name: str) -> Evaluation:
    return Evaluation(config, seed, name)


def balanced(label_N: NDArray[np.int64], percent: float, seed: int) -> NDArray[np.int64]:
    """Ascending rows of ``percent`` (0 < percent <= 100) of each class, rounded to the nearest, at least one.

    A pure function of (labels, seed); fewer percent give a part of what more give. Rows with label -1 are left out.
    """
    assert 0 < percent <= 100
    order = stream.epoch_order(seed, 0, len(label_N))
    chosen = []
    for c in np.unique(label_N[label_N >= 0]):
        mine = order[label_N[order] == c]
        chosen.append(mine[: max(1, int(len(mine) * percent / 100 + 0.5))])
    if not chosen:
        raise ValueError("no image has a label")
    return np.sort(np.concatenate(chosen))


def listed(file: Path, dataset: Any) -> NDArray[np.int64]:
    """Ascending rows of a list file: one per line, a row number, or the name of an image file with or without folders
    (as SimCLR's 1percent.txt: n01440764_10026.JPEG). Empty lines are left out.

    Raises ConfigError naming the file when it is missing, or has lines that are no image of the data set.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"evals.label_list = {str(file)!r} cannot be read: {error}"]) from None
    if not lines:
        raise ConfigError([f"evals.label_list = {str(file)!r} is empty: name at least one image"])
    if all(line.isdigit() for line in lines):
        rows = {line: int(line) for line in lines if int(line) < len(dataset)}
    else:
        rows = _by_name(set(lines), dataset)
    unknown = [line for line in lines if line not in rows]
    if unknown:
        raise ConfigError(
            [
                f"evals.label_list = {str(file)!r}: {len(unknown)} of {len(lines)} lines are no image of "
                f"{dataset.name} ({len(dataset)} images), the first is {unknown[0]!r}"
            ]
        )
    return np.unique(np.array([rows[line] for line in lines], dtype=np.int64))


def _by_name(wanted: set[str], dataset: Any) -> dict[str, int]:
    """The row of each wanted name that the data set has, by the end of its path. ConfigError when a name fits two."""
    depths = {name.count("/") + 1 for name in wanted}
    found: dict[str, int] = {}
    for row in range(len(dataset)):
        path = dataset.path(row)
        if path is None:
            raise ConfigError([f"evals.label_list: the images of {dataset.name} have no names; list row numbers"])
        parts = Path(path).parts
        for depth in depths:
            name = "/".join(parts[-depth:])
            if name in wanted:
                if name in found:
                    raise ConfigError([f"evals.label_list: {name!r} fits two images of {dataset.name}: add the folder"])
                found[name] = row
    return found
