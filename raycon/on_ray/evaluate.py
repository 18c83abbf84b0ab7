"""Evaluations on Ray: features extracted once, kept in the object store; each evaluation a task of its own.

What a task raises stays with it: it is tried again (``evals.retries``), then its evaluation is reported as failed. The
same pieces as in raycon/evals/on_checkpoint.py, elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.config import EvalConfig
from raycon.evals import on_checkpoint
from raycon.evals.base import (
    Outcome,
    Task,
    failure,
    needs_features,
    parse,
    run_one,
    worth_repeating,
)
from raycon.evals.on_checkpoint import Group, Subject

logger = logging.getLogger("raycon")

Parts = dict[str, NDArray[np.float32]]
Done = Callable[[Task, Outcome], None]


def run(
    subject: Subject,
    tasks: Iterable[Task],
    shards: int = 1,
    threads: int = 1,
    done: Done | None = None,
) -> Outcome:
    """Run the tasks on the cluster this process is connected to, as many at a time as ``evals.cpus`` and ``evals.gpus``
    allow. A number does not depend on where it was made.

    shards: extraction tasks per data set. threads: CPU threads of each task. done: called here when a task has ended.
    An evaluation that trains on several ranks is a Ray Train job of ``evals.workers`` workers.
    """
    evals, outcome = subject.config.evals, Outcome({}, {}, {})
    shared = ray.put(subject)
    waiting: dict[ray.ObjectRef, Task] = {}
    alone: list[tuple[Group, list[Task], Task]] = []
    for group, members in on_checkpoint.plan(subject, tasks).items():
        features: list[ray.ObjectRef] = []
        if any(needs_features(task, evals) for task in members):
            extraction = _extract.options(**_resources(evals, gpu=True))
            features = [extraction.remote(shared, group, members, r, shards, threads) for r in range(shards)]
            if shards > 1:  # joined once, not by each evaluation in its own memory
                features = [_join.options(**_resources(evals, gpu=False)).remote(*features)]
        for task in members:
            if evals.workers > 1 and on_checkpoint.on_several(task, evals):
                alone.append((group, members, task))
                continue
            own = features if needs_features(task, evals) else []
            remote = _evaluate.options(**_resources(evals, gpu=not own), name=f"evaluate {task.name}")
            waiting[remote.remote(shared, group, members, task, threads, *own)] = task

    def ended(task: Task, found: Outcome) -> None:
        outcome.add(found)
        if done is not None:
            done(task, found)

    while waiting:
        (ref,), _ = ray.wait(list(waiting), num_returns=1)
        task = waiting.pop(ref)
        try:
            ended(task, ray.get(ref))
        except ray.exceptions.RayError as error:
            if not isinstance(error, ray.exceptions.RayTaskError):
                # Its process was lost, again and again. A cluster that goes down with its driver loses processes too, this
                # one within seconds: then nothing is written down, and who goes on with the run evaluates anew.
                time.sleep(GOING_S)
            ended(task, failure(task, _cause(error)))
    for group, members, task in alone:
        try:
            ended(task, _train(subject, group, members, task, threads))
        except Exception as error:
            ended(task, failure(task, error))
    return outcome


GOING_S = 15.0
"""After this long a cluster that lost its driver is gone (the rest of its processes ended within 10 s)."""


def placement_problems(evals: EvalConfig) -> list[str]:
    """Why the cluster can never place a task: what is asked for and what its largest node has."""
    found = []
    for option, what in (("cpus", "CPU"), ("gpus", "GPU")):
        asked = getattr(evals, option)
        most = max((n["Resources"].get(what, 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)
        if asked > most:
            found.append(f"evals.{option} = {asked:g} can never be placed: no node has more than {most:g} {what}")
    if found or evals.workers == 1:
        return found
    total = ray.cluster_resources()
    for option, what, least in (("cpus", "CPU", 1.0), ("gpus", "GPU", 0.0)):
        asked = max(getattr(evals, option), least) * evals.workers
        if asked > total.get(what, 0.0):
            found.append(
                f"evals.workers = {evals.workers} need {asked:g} {what}, the cluster has {total.get(what, 0.0):g}: give less"
            )
    return found


def of_run(run_dir: Path, checkpoint: Path, threads: int) -> dict[str, Any]:
    """Evaluate a checkpoint of a run as its configuration says, and keep the numbers. Called in a task."""
    subject = on_checkpoint.of_run(run_dir, checkpoint)
    outcome = run(subject, parse(subject.config.evals.names), threads=threads)
    return on_checkpoint.keep(subject, outcome)


def _resources(evals: EvalConfig, gpu: bool) -> dict[str, Any]:
    """CPUs for all; GPUs for those that run the network."""
    return {
        "num_cpus": evals.cpus,
        "num_gpus": evals.gpus if gpu else 0,
        "max_retries": evals.retries,
        "retry_exceptions": True,
    }


def _cause(error: Exception) -> BaseException:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _device(evals: EvalConfig) -> torch.device:
    return torch.device("cuda") if evals.gpus > 0 and torch.cuda.is_available() else torch.device("cpu")


@ray.remote
def _extract(subject: Subject, group: Group, members: list[Task], rank: int, world: int, threads: int) -> Parts:
    """The features of this rank's rows of every split."""
    torch.set_num_threads(threads)
    device = _device(subject.config.evals)
    subject.encoder.to(device)
    source = on_checkpoint.open_source(subject, group[0], members, device)
    return {part: x.numpy() for part, x in on_checkpoint.extract(source, group[1], rank, world).items()}


@ray.remote
def _join(*shards: Parts) -> Parts:
    """The shards' rows one after the other."""
    return {part: np.concatenate([s[part] for s in shards]) for part in shards[0]}


@ray.remote
def _evaluate(subject: Subject, group: Group, members: list[Task], task: Task, threads: int, *found: Parts) -> Outcome:
    """One evaluation. What would fail again is reported at once, the rest raised: Ray tries again."""
    torch.set_num_threads(threads)
    start, config = time.perf_counter(), subject.config
    try:
        device = torch.device("cpu") if found else _device(config.evals)
        source = on_checkpoint.open_source(subject, group[0], members, device)
        sets = on_checkpoint.sets_of(subject, source, group[0], _tensors(found[0])) if found else None
        outcome = Outcome(run_one(task, config.evals, config.seed, sets, source), {}, {})
    except Exception as error:
        if worth_repeating(error):
            raise
        outcome = failure(task, error)
    outcome.seconds[task.name] = time.perf_counter() - start
    return outcome


def _tensors(parts: Parts) -> dict[str, Tensor]:
    """The features where they lie, in shared memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shared memory is read-only, and nothing writes to features
        return {part: torch.from_numpy(x) for part, x in parts.items()}


# --- an evaluation on several workers ---------------------------------------------------------------------------


def _train(subject: Subject, group: Group, members: list[Task], task: Task, threads: int) -> Outcome:
    """An evaluation that trains with DDP, as a Ray Train job: tried again as a whole, from the state it kept."""
    import ray.train
    import ray.train.torch

    start, evals = time.perf_counter(), subject.config.evals
    resources = {"CPU": max(evals.cpus, 1.0)} | ({"GPU": evals.gpus} if evals.gpus else {})
    # Beside the run: workers on other nodes must see it, as they see the run.
    folder = subject.file.parent / ".unfinished" / f"train-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    given = {"subject": ray.put(subject), "group": group, "members": members, "task": task, "threads": threads,
             "failure": folder / "failure.txt"}  # fmt: skip
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=given,
        scaling_config=ray.train.ScalingConfig(
            num_workers=evals.workers, use_gpu=evals.gpus > 0, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if evals.gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="evaluate",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=evals.retries),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        ),
    )
    numbers: dict[str, float] = {}
    try:
        numbers = trainer.fit().return_value or {}  # rank 0's; metrics are kept only with a checkpoint
        said = _said(given["failure"])
    except ray.train.TrainingFailedError as error:
        last = (str(error).strip().splitlines() or [""])[-1]
        said = _said(given["failure"]) or f"its workers failed {evals.retries + 1} times: {last}"
        logger.debug("%s", error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds the state of an unfinished training
            folder.parent.rmdir()
    if said:
        return failure(task, RuntimeError(said))
    return Outcome(numbers, {}, {task.name: time.perf_counter() - start})


def _said(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _worker(given: dict[str, Any]) -> dict[str, float]:
    """One rank. What would fail again is written down, and the attempts after it end at once."""
    import ray.train.torch

    if given["failure"].exists():
        return {}
    torch.set_num_threads(given["threads"])
    subject, (name, _), task = ray.get(given["subject"]), given["group"], given["task"]
    try:
        source = on_checkpoint.open_source(subject, name, given["members"], ray.train.torch.get_device())
        return run_one(task, subject.config.evals, subject.config.seed, None, source)
    except Exception as error:
        if worth_repeating(error):
            raise
        given["failure"].write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
