"""What all evaluations share: their data, how they are found by name, how they are run and kept.

An evaluation is one file in this folder with a class ``Evaluation``: constructor ``Evaluation(config, seed)``, then
``run(sets) -> dict[str, float]`` of numbers named "<file>/<number>", such as "knn/top1_k20". Adding the file registers
it. Accuracies (``top1``) are in percent, 0 to 100, as the papers print them.

Importing this file imports neither torch nor the evaluations, so their names can be listed quickly.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import math
import os
import pkgutil
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from raycon.core.config import ConfigError, EvalConfig

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_HELPERS = frozenset({"base", "features", "on_checkpoint"})
"""Files of this folder that are not evaluations."""


class FeatureSets(NamedTuple):
    """Features of one encoder, extracted once and shared by all evaluations. All on the CPU.

    When a data set has no test split, ``test`` is the same tensor as ``train``: kNN then leaves each row itself out.
    """

    train: Tensor
    """(N, D) float32."""
    train_label: Tensor
    """(N,) int64, 0 <= label."""
    test: Tensor
    """(M, D) float32."""
    test_label: Tensor
    """(M,) int64."""

    @property
    def classes(self) -> int:
        return int(max(self.train_label.max(), self.test_label.max())) + 1


class Evaluation(Protocol):
    def run(self, sets: FeatureSets) -> dict[str, float]:
        """Named numbers; raises ValueError when the data cannot be evaluated this way."""
        ...


class Outcome(NamedTuple):
    results: dict[str, float]
    """All numbers; "<name>/failed": 1.0 for an evaluation that crashed."""
    failed: dict[str, str]
    """The error text of each evaluation that crashed."""
    seconds: dict[str, float]
    """Wall time of each evaluation."""


def names() -> tuple[str, ...]:
    """All evaluations, by the names of their files."""
    folder = Path(__file__).parent
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if m.name not in _HELPERS))


def build(name: str, config: EvalConfig, seed: int = 0) -> Evaluation:
    """The evaluation ``name`` under these options. Raises ConfigError naming all evaluations when there is no such."""
    if name not in names():
        raise ConfigError([f"evals.names: no evaluation {name!r}; there are {', '.join(names())}"])
    evaluation: Evaluation = importlib.import_module(f"raycon.evals.{name}").Evaluation(config, seed)
    return evaluation


def check(sets: FeatureSets) -> None:
    """Raises ValueError when features and labels do not fit together or are not finite."""
    for what, features, label in (
        ("train", sets.train, sets.train_label),
        ("test", sets.test, sets.test_label),
    ):
        if features.ndim != 2 or label.shape != features.shape[:1] or len(label) == 0:
            raise ValueError(
                f"{what} features {tuple(features.shape)} with labels {tuple(label.shape)}: give (N, D) and (N,), N > 0"
            )
        if not bool(features.isfinite().all()):
            bad = (~features.isfinite().all(1)).nonzero().flatten()
            raise ValueError(f"{len(bad)} {what} features are not finite, the first at row {int(bad[0])}")
        if int(label.min()) < 0:
            raise ValueError(f"{what} label {int(label.min())}: evaluations need a label >= 0 for every row")
    if sets.train.shape[1] != sets.test.shape[1]:
        raise ValueError(f"train features have width {sets.train.shape[1]}, test features {sets.test.shape[1]}")


def run_all(wanted: Iterable[str], config: EvalConfig, sets: FeatureSets, seed: int = 0) -> Outcome:
    """Run evaluations one after another on the same features; one that crashes takes no other down.

    A number that is not finite counts as a crash of its evaluation. Raises ConfigError for an unknown name (before
    anything runs) and ValueError for features no evaluation could use.
    """
    evaluations = {name: build(name, config, seed) for name in wanted}
    check(sets)
    outcome = Outcome({}, {}, {})
    for name, evaluation in evaluations.items():
        start = time.perf_counter()
        try:
            numbers = evaluation.run(sets)
            broken = [f"{key} = {value}" for key, value in numbers.items() if not math.isfinite(value)]
            if broken:
                raise ValueError(f"not finite: {', '.join(broken)}")
            outcome.results.update(numbers)
        except Exception as error:  # whatever it is, the other evaluations and the training must go on
            log.warning("evaluation %s failed: %s", name, error)
            log.debug("%s", traceback.format_exc())
            outcome.results[f"{name}/failed"] = 1.0
            outcome.failed[name] = f"{type(error).__name__}: {error}"
        outcome.seconds[name] = time.perf_counter() - start
    return outcome


def append_results(file: Path, entry: Mapping[str, Any]) -> None:
    """Add ``entry`` to ``evaluations.json``: a list of entries, by step.

    {"step": int, "epoch": int, "checkpoint": str, "results": {...}, "failed": {name: text}, "seconds": {...}}; an entry
    of something that is not a checkpoint of the run (raw pixels, the untrained encoder) also says "control": name.
    An evaluation already there for the same step (and control) is replaced, its other evaluations stay. Safe against
    other processes doing the same (lock file beside it) and against a kill at any moment (written beside, then renamed).
    Raises ValueError when the file is there and holds something else, or when a result is not finite.
    """
    file = Path(file)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = read_results(file)
        new = {"failed": {}, "seconds": {}, **entry}
        kept = []
        for old in entries:
            if (old.get("step"), old.get("control")) == (new.get("step"), new.get("control")):
                new = _merged(old, new)
            else:
                kept.append(old)
        kept.append(new)
        kept.sort(key=lambda e: ("control" not in e, e["step"]))
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, file)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The entries of ``evaluations.json``, [] when there is none yet. Raises ValueError when it holds something else."""
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); move it away and evaluate again") from error
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "step" in e for e in entries):
        raise ValueError(f"{file} is not a list of evaluation entries; move it away and evaluate again")
    return entries


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    again = {key.split("/")[0] for key in (*new["results"], *new["failed"])}
    merged = {**old, **new}
    for part in ("results", "failed", "seconds"):
        stays = {key: value for key, value in old.get(part, {}).items() if key.split("/")[0] not in again}
        merged[part] = {**stays, **new[part]}
    return merged
