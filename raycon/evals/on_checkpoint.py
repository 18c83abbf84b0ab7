"""Evaluate a checkpoint: read its encoder, extract features once per data set, run evaluations, keep the numbers.

``evaluate`` does it for a checkpoint of a run; the program ``python -m raycon.evaluate`` for any file. The same pieces
run one after another in this process (``run_here``) or each on a Ray task (raycon/on_ray/evaluate.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raycon import methods
from raycon.core import log
from raycon.core.config import ConfigError, EvalConfig, Facts, RunConfig, from_dict, to_dict
from raycon.core.stream import shard_range
from raycon.evals import features
from raycon.evals.base import (
    FeatureSets,
    Outcome,
    Source,
    Task,
    append_results,
    build,
    check,
    failure,
    needs_features,
    parse,
    read_results,
    run_all,
)
from raycon.evals.protocols import TRANSFER


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated and where its numbers go. Can be pickled."""

    config: RunConfig
    """Seed, ``data.*`` and ``evals.*`` of the evaluation."""
    own: str
    """The data set the encoder was trained with, "" when it is not known."""
    encoder: nn.Module
    mean: tuple[float, ...]
    """Of the images the encoder was trained with, per channel."""
    std: tuple[float, ...]
    entry: dict[str, Any]
    """Step, epoch, checkpoint (and control) of the entry in evaluations.json."""
    file: Path
    """evaluations.json."""
    metrics: Path | None = None
    """metrics.jsonl of the run, when there is one."""
    assignment: tuple[Tensor, ...] = ()
    """Per clustering (N,): the run's own snapshot."""
    cache: Path

    def __post_init__(self) -> None:
        for name in ("file", "cache"):  # Ray's workers run elsewhere
            object.__setattr__(self, name, getattr(self, name).absolute())

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"config": to_dict(self.config)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The class of a method's options is made anew in every process, so the configuration travels as a plain dict.
        config = from_dict(state["config"], methods.options(state["config"]["method"]["name"] or "moco"))
        for name, value in (state | {"config": config}).items():
            object.__setattr__(self, name, value)

    def data(self, task: Task) -> str:
        """The name of the data set a task is about."""
        return task.data or self.config.data.name

    def named(self, task: Task) -> Task:
        """The task as its numbers are named: without the data set when it is the encoder's own, or it has no use for one."""
        data = "" if without_data(task, self.config.evals) else self.data(task)
        return task._replace(data="" if data == self.own else data)


Group = tuple[str, bool]
"""Tasks that share features: the name of the data set, and whether nothing is cut off the images."""


# --- what is evaluated ------------------------------------------------------------------------------------------


def of_run(run_dir: Path, checkpoint: Path, config: RunConfig | None = None) -> Subject:
    """A checkpoint of a run; ``config``: its own with other ``evals.*`` and ``data.*`` for the evaluation.

    Raises ConfigError when the data it was trained with are not here, CheckpointError when it cannot be read.
    """
    from raycon.training import checkpoint as checkpoints  # siblings on this floor: the file format, the data
    from raycon.training import job

    own = methods.read_config(run_dir / "config.yaml")
    saved = checkpoints.load(checkpoint)
    train = job.open_data(own)
    return Subject(
        config=config or own,
        own=own.data.name,
        encoder=build_encoder(own, train, saved.model),
        mean=tuple(train.mean),
        std=tuple(train.std),
        entry={"step": saved.step, "epoch": saved.state["epoch"], "checkpoint": saved.path.name},
        file=run_dir / "evaluations.json",
        metrics=run_dir / "metrics.jsonl",
        assignment=saved.snapshot.assignment if saved.snapshot is not None else (),
        cache=Path(own.data.cache or run_dir.parent / ".cache"),
    )


def build_encoder(config: RunConfig, dataset: Any, state: dict[str, Tensor] | None) -> nn.Module:
    """The encoder of a run: from a checkpoint's tensors, or as it was before training."""
    from raycon.nn import networks

    torch.manual_seed(config.seed)
    encoder = networks.build_encoder(replace(config.model, weights=""), len(dataset.mean))
    classes = len(dataset.weak_classes) or int(dataset.weak.max(initial=-1)) + 1
    facts = Facts(len(dataset), classes, dataset.image, config.train.batch, 1, config.data.size, config.train.epochs)
    method = methods.module(config.method.name).build(config.method, encoder, facts)
    if state is not None:
        method.load_state_dict(state)
    trained: nn.Module = method.encoder()
    return trained.eval()


class Pixels(nn.Module):
    """The control "no encoder": raw pixels, 0 to 1, as the features."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> None:
        super().__init__()
        self.mean, self.std, self.features = mean, std, len(mean) * size**2

    def forward(self, images: Tensor) -> Tensor:
        return features.pixels(images, self.mean, self.std)


def controls_of(subject: Subject, run_dir: Path) -> list[Subject]:
    """Raw pixels and the encoder before training in place of the encoder: what any result is held against."""
    own = methods.read_config(run_dir / "config.yaml")
    train, _ = open_sets(own)
    encoders: dict[str, nn.Module] = {
        "pixels": Pixels(subject.mean, subject.std, own.data.size),
        "untrained": build_encoder(own, train, None),
    }
    entry = {"step": 0, "epoch": 0, "checkpoint": ""}
    return [
        dataclasses.replace(subject, encoder=encoder, entry=entry | {"control": name}, assignment=())
        for name, encoder in encoders.items()
    ]


# --- its data ---------------------------------------------------------------------------------------------------


def open_sets(config: RunConfig) -> tuple[Any, Any]:
    """The train split and the test split: "test", or "val" where there is no test, or None where there is neither.

    With ``data.validation``, the rows held out of training stand in for the test split, which is not opened.
    """
    from raycon.training import job

    train = job.open_data(config)
    if config.data.validation:
        return train, job.open_data(config, "validation")
    return train, _split(config, "test") or _split(config, "val")


def _split(config: RunConfig, split: str) -> Any:
    """A split, None when the data set has no such. Raises ConfigError when its files are missing or damaged."""
    from raycon.training import job

    try:
        return job.open_data(config, split)
    except ConfigError as error:
        if all("has no split" in p or "has no folder" in p for p in error.problems):
            return None
        raise


def config_for(config: RunConfig, name: str) -> RunConfig:
    """The configuration that opens a data set: ``data.*`` for that of ``data.name``; another one lies in the folder of
    its name in ``evals.roots``, or in its usual place."""
    if name == config.data.name:
        return config
    root = Path(config.evals.roots).expanduser() / name
    found = str(root) if config.evals.roots and root.is_dir() else ""
    data = replace(config.data, name=name, root=found, listing="", columns=(), level="", validation=0.0)
    return replace(config, data=data)


def open_source(subject: Subject, name: str, members: Iterable[Task], device: torch.device) -> Source:
    """The encoder with a data set, or without when none of the tasks is about one (detection has its own).

    Raises ConfigError when the data are not here or do not fit the encoder.
    """
    train = test = more = None
    if not all(without_data(task, subject.config.evals) for task in members):
        config = config_for(subject.config, name)
        train, test = open_sets(config)
        # Where the protocols' sets have a validation split, everyone trains on train and validation.
        more = _split(config, "val") if name in TRANSFER and TRANSFER[name].given_validation else None
        for dataset in (train, test, more):
            if dataset is not None:
                features.check_channels(dataset, subject.mean)
    return Source(
        encoder=subject.encoder, train=train, test=test, more=more, size=subject.config.data.size, mean=subject.mean,
        std=subject.std, device=device, cache=subject.cache, workers=subject.config.data.workers,
        unfinished=subject.file.parent / ".unfinished",
    )  # fmt: skip


def labels(dataset: Any) -> tuple[Tensor, Tensor | None]:
    """(N,) labels, and (N, C) where an image can have several: then the first of them (0 for none) stands as label."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return torch.as_tensor(np.asarray(dataset.label)), None
    return torch.as_tensor((np.asarray(targets) > 0).argmax(1)), torch.as_tensor(np.asarray(targets))


def extract(source: Source, whole: bool, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The features of the splits: "train", and "more" and "test" where they are there; those of rank's rows.

    whole: nothing is cut off the images' shorter side.
    """
    found = {}
    for part, dataset in (("train", source.train), ("more", source.more), ("test", source.test)):
        if dataset is not None:
            first, end = shard_range(len(dataset), rank, world)
            blocks = features.scan(source, dataset, source.size if whole else None, rank, world)
            found[part] = features.extract(source.encoder, blocks, end - first, first)
    return found


def sets_of(subject: Subject, source: Source, name: str, parts: dict[str, Tensor]) -> FeatureSets:
    """The features of all rows with the labels of the data set."""
    train, (label, multi) = parts["train"], labels(source.train)
    validation = None
    if source.more is not None:
        validation = torch.arange(len(train), len(train) + len(source.more))
        more_label, more_multi = labels(source.more)
        train, label = torch.cat([train, parts["more"]]), torch.cat([label, more_label])
        multi = None if multi is None or more_multi is None else torch.cat([multi, more_multi])
    test, test_label, test_multi = train, label, multi
    if source.test is not None:
        test, (test_label, test_multi) = parts["test"], labels(source.test)
    own = tuple(a for a in subject.assignment if name == subject.own and len(a) == len(train))
    return FeatureSets(
        train, label.long(), test, test_label.long(), validation_rows=validation, train_multi=multi,
        test_multi=test_multi, assignment=own, data=name,
    )  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------


def plan(subject: Subject, tasks: Iterable[Task]) -> dict[Group, list[Task]]:
    """The tasks by what they share."""
    groups: dict[Group, list[Task]] = {}
    for task in dict.fromkeys(subject.named(t) for t in tasks):
        whole = bool(getattr(build(task, subject.config.evals), "whole", False))
        groups.setdefault((task.data or subject.own, whole), []).append(task)
    return groups


def problems(subject: Subject, tasks: Iterable[Task]) -> list[str]:
    """What will not work, before anything runs: data sets that are not here or do not fit the encoder."""
    found: list[str] = []
    for (name, _), members in plan(subject, tasks).items():
        try:
            open_source(subject, name, members, torch.device("cpu"))
        except (ConfigError, OSError) as error:
            found += _told(error, members)
        found += own_problems(members, subject.config)
    return list(dict.fromkeys(found))


def start_problems(config: RunConfig, tasks: Iterable[Task]) -> list[str]:
    """What will not work of the evaluations of a run, before it trains: settings, and data sets besides its own."""
    tasks = list(tasks)
    found = own_problems(tasks, config)
    for name in dict.fromkeys(task.data for task in tasks if task.data not in ("", config.data.name)):
        try:
            open_sets(config_for(config, name))
        except (ConfigError, OSError) as error:
            found += _told(error, [task for task in tasks if task.data == name])
    return list(dict.fromkeys(found))


def own_problems(tasks: Iterable[Task], config: RunConfig) -> list[str]:
    """What the evaluations themselves say against their settings."""
    return [p for task in tasks for p in getattr(build(task, config.evals), "problems", list)()]


def _told(error: ConfigError | OSError, tasks: Iterable[Task]) -> list[str]:
    names = ", ".join(task.name for task in tasks)
    return [f"{names}: {p}" for p in getattr(error, "problems", [str(error)])]


def without_data(task: Task, evals: EvalConfig) -> bool:
    """Does it bring its images itself (detection)?"""
    return bool(getattr(build(task, evals), "without_data", False))


def on_several(task: Task, evals: EvalConfig) -> bool:
    """Does it train on several ranks, where there are several?"""
    return bool(getattr(build(task, evals), "distributed", False))


def run_here(
    subject: Subject,
    tasks: Iterable[Task],
    device: torch.device,
    done: Callable[[Task, Outcome], None] = lambda task, outcome: None,
) -> Outcome:
    """Run the tasks one after another in this process. What goes wrong with a data set fails its tasks, not the others.

    done: called when a task has ended.
    """
    config, outcome = subject.config, Outcome({}, {}, {})
    subject.encoder.to(device)
    for (name, whole), members in plan(subject, tasks).items():
        using = [task for task in members if needs_features(task, config.evals)]
        source, sets = None, None
        ended: dict[Task, Outcome] = {}
        try:
            source = open_source(subject, name, members, device)
        except Exception as error:
            ended = {task: failure(task, error) for task in members}
        try:
            if using and source is not None:
                sets = sets_of(subject, source, name, extract(source, whole))
                check(sets)
        except Exception as error:
            ended = {task: failure(task, error) for task in using}
        for task in members:
            found = ended.get(task) or run_all([task], config.evals, sets, config.seed, source)
            outcome.add(found)
            done(task, found)
    return outcome


def evaluate(
    run_dir: Path, checkpoint: Path, names: Iterable[str] = (), device: torch.device | None = None, threads: int = 0
) -> dict[str, Any]:
    """Evaluate ``checkpoint`` of ``run_dir`` here; ``names`` empty: those of the configuration.

    Adds the entry to evaluations.json and a line to metrics.jsonl, and returns it.
    """
    if threads:
        torch.set_num_threads(threads)
    subject = of_run(run_dir, checkpoint)
    tasks = parse(names or subject.config.evals.names)
    return keep(subject, run_here(subject, tasks, device or torch.device("cpu")))


def controls(run_dir: Path, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The same evaluations of raw pixels and of the encoder before training, each kept as an entry."""
    from raycon.training import checkpoint as checkpoints

    newest, refused = checkpoints.newest(run_dir / "checkpoints")
    if newest is None:
        raise ConfigError([f"{run_dir}: no readable checkpoint{': ' if refused else ''}{'; '.join(refused)}"])
    subject = of_run(run_dir, newest)
    tasks = parse(names or subject.config.evals.names)
    return [keep(c, run_here(c, tasks, torch.device("cpu"))) for c in controls_of(subject, run_dir)]


def keep(subject: Subject, outcome: Outcome) -> dict[str, Any]:
    """Add the outcome to evaluations.json and, in a run, to metrics.jsonl; returns the entry."""
    results = {"results": outcome.results, "failed": outcome.failed, "seconds": outcome.seconds}
    entry = {**subject.entry, **results}
    append_results(subject.file, entry)
    if subject.metrics is not None:
        line = {"kind": "evaluation", "step": entry["step"], "epoch": entry["epoch"], **outcome.results}
        log.append_line(subject.metrics, line | ({"control": entry["control"]} if "control" in entry else {}))
    return entry


def last_entry(run_dir: Path) -> dict[str, Any] | None:
    """The newest evaluation of the run itself."""
    entries = read_results(run_dir / "evaluations.json")
    own = [e for e in entries if "control" not in e]
    return max(own, key=lambda e: e["step"]) if own else None
