"""What all evaluations share: their data, how they are found by name, how they are run and kept.

An evaluation is one file in this folder with a class ``Evaluation``: constructor ``Evaluation(config, seed)``, then
``run(sets) -> dict[str, float]`` of numbers named "<file>/<number>", such as "knn/top1_k20"; or, when it looks at the
images themselves, ``run_on(source)`` in place of ``run``. Adding the file registers it (a function ``preset(config,
seed, name)`` makes the evaluation of a published protocol). Accuracies (``top1``) are in
percent, 0 to 100, as the papers print them.

What a person asks for is a task: "knn", "linear:pcl" (a published protocol, see protocols.py), "knn@cifar10" (on
another data set than the run's), or both. Numbers are then named "<task>/<number>".

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from raycon.core.config import ConfigError, EvalConfig
from raycon.evals.protocols import PRESETS, TRANSFER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)

_HELPERS = frozenset({"base", "coco", "features", "metrics", "on_checkpoint", "protocols", "rcnn", "sgd"})
"""Files of this folder that are not evaluations."""


class FeatureSets(NamedTuple):
    """Features of one encoder, extracted once and shared by all evaluations. All on the CPU, never written to.

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
    validation_rows: Tensor | None = None
    """Rows of train that the data set gives as its validation split."""
    train_multi: Tensor | None = None
    """(N, C) int8 of a data set with several labels per image: 1 there, -1 not there, 0 there but difficult."""
    test_multi: Tensor | None = None
    """(M, C) int8."""
    assignment: tuple[Tensor, ...] = ()
    """Per clustering of the run's own snapshot (N,) int64."""
    data: str = ""
    """The name of the data set."""

    @property
    def classes(self) -> int:
        return int(max(self.train_label.max(), self.test_label.max())) + 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """What features come from, for evaluations that train the encoder or augment its images. Can be pickled."""

    encoder: nn.Module
    """(B, C, H, W) -> (B, F), its attribute ``features`` is F; shared: copy it before changing it."""
    train: Any
    """The data set's ImageSet (data_loaders/datasets)."""
    test: Any
    """None when there is no test split."""
    size: int
    """Side of an image for the encoder, in pixels."""
    mean: tuple[float, ...]
    """Of the images the encoder was trained with, per channel."""
    std: tuple[float, ...]
    device: torch.device
    cache: Path
    workers: int = 0
    """Helper processes that read images."""
    more: Any = None
    """A validation split, where it belongs to train by the protocols."""
    unfinished: Path | None = None
    """Where a long training keeps its state until it has ended, so that a retry goes on; every node sees it. None:
    nothing is kept."""


class Evaluation(Protocol):
    def run(self, sets: FeatureSets) -> dict[str, float]:
        """Named numbers; raises ValueError when the data cannot be evaluated this way."""
        ...


class ImageEvaluation(Protocol):
    def run_on(self, source: Source) -> dict[str, float]:
        """As ``Evaluation.run``, from the encoder and the images."""
        ...


class Task(NamedTuple):
    """One thing asked for: "evaluation:preset@data"."""

    evaluation: str
    preset: str = ""
    data: str = ""
    """Empty: the run's own data set."""

    @property
    def name(self) -> str:
        return self.evaluation + (f":{self.preset}" if self.preset else "") + (f"@{self.data}" if self.data else "")


class Outcome(NamedTuple):
    results: dict[str, float]
    """All numbers; "<task>/failed": 1.0 for an evaluation that crashed."""
    failed: dict[str, str]
    """The error text of each evaluation that crashed."""
    seconds: dict[str, float]
    """Wall time of each evaluation."""

    def add(self, other: Outcome) -> None:
        self.results.update(other.results)
        self.failed.update(other.failed)
        self.seconds.update(other.seconds)


def names() -> tuple[str, ...]:
    """All evaluations, by the names of their files, each followed by its presets."""
    folder = Path(__file__).parent
    files = sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if m.name not in _HELPERS)
    return tuple(name for file in files for name in (file, *(f"{file}:{p}" for p in PRESETS.get(file, ()))))


def parse(wanted: Iterable[str]) -> list[Task]:
    """The tasks of a list of names, each once. ``transfer@all`` stands for ssl-transfer's eleven data sets.

    Raises ConfigError naming all that are unknown.
    """
    tasks, problems, known = [], [], names()
    for text in wanted:
        what, _, data = text.partition("@")
        if what not in known:
            problems.append(f"evals.names: no evaluation {what!r}; there are {', '.join(known)}")
            continue
        evaluation, _, preset = what.partition(":")
        sets = TRANSFER if (evaluation, data) == ("transfer", "all") else (data,)
        tasks += [Task(evaluation, preset, name) for name in sets]
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(tasks))


def build(task: str | Task, config: EvalConfig, seed: int = 0) -> Any:
    """The Evaluation or ImageEvaluation of a task. Raises ConfigError naming all evaluations when there is no such."""
    (task,) = parse([task]) if isinstance(task, str) else (task,)
    module = importlib.import_module(f"raycon.evals.{task.evaluation}")
    return module.preset(config, seed, task.preset) if task.preset else module.Evaluation(config, seed)


def needs_features(task: Task, config: EvalConfig) -> bool:
    """Features extracted once serve it; else it looks at the images itself."""
    return hasattr(build(task, config), "run")


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
        for first in range(0, len(features), _CHECKED):
            block = features[first : first + _CHECKED]
            if bool(block.sum().isfinite()):  # then every one is: thirty times as fast as asking each
                continue
            fine = block.isfinite().all(1)
            if not bool(fine.all()):
                row = first + int((~fine).nonzero()[0])
                raise ValueError(f"{what} features are not finite, the first of them at row {row}")
        if int(label.min()) < 0:
            raise ValueError(f"{what} label {int(label.min())}: evaluations need a label >= 0 for every row")
    if sets.train.shape[1] != sets.test.shape[1]:
        raise ValueError(f"train features have width {sets.train.shape[1]}, test features {sets.test.shape[1]}")


_CHECKED = 65_536


def run_all(
    wanted: Iterable[str | Task],
    config: EvalConfig,
    sets: FeatureSets | None,
    seed: int = 0,
    source: Source | None = None,
) -> Outcome:
    """Run evaluations one after another on the same data; one that crashes takes no other down.

    A crash is tried ``evals.retries`` times more; on several ranks it is raised. A number that is not finite counts as a crash of its evaluation.
    Raises ConfigError for an unknown name (before anything runs) and ValueError for features no evaluation could use.
    """
    from raycon.core import dist  # not above: names are listed without torch

    tasks = [t for name in wanted for t in (parse([name]) if isinstance(name, str) else [name])]
    for task in tasks:
        build(task, config, seed)
    if sets is not None and any(needs_features(task, config) for task in tasks):
        check(sets)
    outcome = Outcome({}, {}, {})
    for task in tasks:
        start = time.perf_counter()
        for attempt in range(config.retries + 1):
            try:
                outcome.results.update(run_one(task, config, seed, sets, source))
                break
            except Exception as error:  # whatever it is, the other evaluations and the training must go on
                if dist.world() > 1:
                    raise  # the other ranks wait in a collective: who started them ends and restarts all together
                if attempt == config.retries or not worth_repeating(error):
                    outcome.add(failure(task, error))
                    break
                log.warning("evaluation %s failed and is tried again: %s", task.name, error)
        outcome.seconds[task.name] = time.perf_counter() - start
    return outcome


def run_one(
    task: Task, config: EvalConfig, seed: int, sets: FeatureSets | None, source: Source | None
) -> dict[str, float]:
    """The numbers of one task, named after it. Raises whatever goes wrong, ValueError when a number is not finite."""
    evaluation = build(task, config, seed)
    given = sets if hasattr(evaluation, "run") else source
    if given is None:
        raise ValueError(f"{task.name} needs {'features' if hasattr(evaluation, 'run') else 'the encoder and images'}")
    numbers = evaluation.run(given) if hasattr(evaluation, "run") else evaluation.run_on(given)
    broken = [f"{key} = {value}" for key, value in numbers.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"not finite: {', '.join(broken)}")
    return {f"{task.name}/{key.split('/', 1)[1]}": value for key, value in numbers.items()}


def worth_repeating(error: BaseException) -> bool:
    """A wrong request or data that do not fit would fail again; memory, a device, a disk may do better next time."""
    return not isinstance(error, (ValueError, TypeError, AssertionError, KeyError, ImportError))


def failure(task: Task, error: BaseException) -> Outcome:
    """The outcome of a task that did not work."""
    log.warning("evaluation %s failed: %s", task.name, error)
    log.debug("%s", "".join(traceback.format_exception(error)))
    return Outcome({f"{task.name}/failed": 1.0}, {task.name: f"{type(error).__name__}: {error}"}, {})


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); move it away and evaluate again") from error
    if not isinstance(entries, list) or not all(
        isinstance(e, dict)
        and "step" in e
        and all(isinstance(e.get(k, {}), dict) for k in ("results", "failed", "seconds"))
        for e in entries
    ):
        raise ValueError(f"{file} is not a list of evaluation entries; move it away and evaluate again")
    return entries


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    again = {key.split("/")[0] for key in (*new["results"], *new["failed"])}
    merged = {**old, **new}
    for part in ("results", "failed", "seconds"):
        stays = {key: value for key, value in old.get(part, {}).items() if key.split("/")[0] not in again}
        merged[part] = {**stays, **new[part]}
    return merged
