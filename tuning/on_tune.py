"""A sweep on Ray Tune: the searcher, the scheduler and the record, each a thin layer over Tune's own.

Tune's files are a cache in DIR/.tune that is never read back; DIR/trials.jsonl is what a resumed sweep goes on from.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from raycon.core.config import Facts, RunConfig

from . import place, record
from .propose import Proposer
from .record import ENDED, Plan, Record, Trial
from .space import Choice, Space, in_flight
from .study import Study
from .trial import TrialFailed, orders_of, trainable_class
from .watch import Watch

_CACHE = ".tune"
_CAUSE = 600
"""Most letters of an error that are kept."""
_NUMBER = "raycon_trial"
"""In Tune's configuration of a trial when it is made: its number, which becomes its name."""
SCORE, EPOCH = "score", "epoch"
_MARKET = "ray.io/market-type"
"""The label of nodes that tells spot nodes, see on_ray/index.py."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def trials_at_once(config: RunConfig, facts: Facts, limit: int) -> tuple[int, str]:
    """(how many trials of ``config`` the cluster can hold, at most ``limit``; its demand and supply in words)."""
    from raycon.training.job import feature_dim

    trial = place.bundles(config, facts, feature_dim(config))
    nodes = [
        node["Resources"] | ({} if (node.get("Labels") or {}).get(_MARKET) == "spot" else {place.KEPT: math.inf})
        for node in ray.nodes()
        if node["Alive"]
    ]
    return place.most_trials(trial, nodes, limit), place.told(trial, nodes)


def run(
    folder: Path,
    plan: Plan,
    base: RunConfig,
    proposer: Proposer,
    known: Mapping[int, Trial],
    at_once: int,
    watch: Watch,
) -> None:
    """Run all trials that have not ended. Returns when they have, or when the sweep was asked to stop."""
    study = plan.study
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables go by an older switch, verbose=0, then
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it would name another way to resume than ours
    left = [number for number, trial in known.items() if trial.state not in ENDED]
    if not left:
        return
    orders = replace(
        orders_of(base, folder / record.FOLDER, plan.token, study.metric, group=folder.name),
        by_name=True,
        stop_file=str(folder / record.STOP),
    )
    cache = folder / _CACHE
    shutil.rmtree(cache, ignore_errors=True)
    keeper = Keeper(Record(folder), plan, base.train.epochs, known, watch)
    searcher: Searcher | None = None
    space: dict[str, Any] = {}
    points = [options_of(known[n], proposer) | {_NUMBER: n} for n in left] if study.scheduler == "pbt" else []
    if points:  # Tune's PBT goes with its own searcher only: it is given the points
        space = {name: tune.choice([p[name] for p in points]) for name in points[0]}
        searcher = tune.search.BasicVariantGenerator(points_to_evaluate=points)
    else:
        searcher = Proposals(proposer, known, left, study.mode)
    tuner = tune.Tuner(
        trainable_class(orders),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode=study.mode,
            search_alg=searcher,
            scheduler=scheduler(study, base.train.epochs, known),
            num_samples=len(left),
            max_concurrent_trials=None if points else at_once,  # PBT's population is no larger: checked before
            trial_name_creator=lambda trial: f"{trial.config[_NUMBER]:04d}",
        ),
        run_config=tune.RunConfig(
            name=time.strftime("session-%Y%m%d-%H%M%S"),
            storage_path=str(cache),
            failure_config=tune.FailureConfig(max_failures=study.retries),
            callbacks=[keeper],
            verbose=0,
        ),
    )
    with watch, warnings.catch_warnings():
        # Tune advises to reuse the actors of ended trials; a stopped trial would then train on until the next one.
        warnings.filterwarnings("ignore", message="Consider boosting PBT")
        tuner.fit()
    if not (folder / record.STOP).exists():
        shutil.rmtree(cache, ignore_errors=True)


def options_of(trial: Trial, proposer: Proposer) -> dict[str, Any]:
    """What a trial began with, or what is proposed for a new one."""
    return dict(trial.options) or proposer.propose(trial.number)


class Proposals(Searcher):
    """Tune's searcher interface over a Proposer; trials that were cut off come first, with what they had."""

    def __init__(self, proposer: Proposer, known: Mapping[int, Trial], left: list[int], mode: str) -> None:
        super().__init__(metric=SCORE, mode=mode)
        self._proposer = proposer
        self._known = known
        self._left = sorted(left, key=lambda n: (not known[n].options, n))
        self._running: dict[str, dict[str, Any]] = {}
        for trial in known.values():
            if trial.state in ENDED:
                proposer.tell(trial.options, trial.score)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if not self._left:
            return Searcher.FINISHED  # type: ignore[return-value]
        number = self._left.pop(0)
        options = options_of(self._known[number], self._proposer)
        self._running[trial_id] = options
        return options | {_NUMBER: number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        score = None if error or result is None else result.get(SCORE)
        if score is not None and not math.isfinite(score):  # stopped with the sweep before its first score
            score = None
        self._proposer.tell(self._running.pop(trial_id), score)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: trials.jsonl has it all."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("Tune's own state is not read back")


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving that knows the trials of earlier sessions: a resumed sweep is as strict."""

    def __init__(self, past: list[Trial], **settings: Any) -> None:
        super().__init__(**settings)
        self._past = past

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        past, self._past = self._past, []
        for old in past:
            told = SimpleNamespace(trial_id=f"past-{old.number}")
            super().on_trial_add(tune_controller, told)
            for epoch, score in sorted(old.scores.items()):
                self.on_trial_result(tune_controller, told, {EPOCH: epoch, SCORE: score})
            self.on_trial_remove(tune_controller, told)
        super().on_trial_add(tune_controller, trial)


def scheduler(study: Study, epochs: int, known: Mapping[int, Trial]) -> TrialScheduler:
    """The scheduler of this name; time is counted in epochs trained."""
    if study.scheduler == "none":
        return FIFOScheduler()
    if study.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=EPOCH,
            perturbation_interval=study.grace_epochs,
            hyperparam_mutations=mutations(study.space),
            quantile_fraction=0.25,
            custom_explore_fn=Clip(study.space),
            log_config=False,
        )
    rungs = int(math.log(max(epochs, 2) / study.grace_epochs) / math.log(study.reduction)) + 1
    return Halving(
        [t for t in known.values() if t.state in ENDED],
        time_attr=EPOCH,
        max_t=epochs,
        grace_period=study.grace_epochs,
        reduction_factor=study.reduction,
        brackets=min(3, max(1, rungs)) if study.scheduler == "hyperband" else 1,
    )


def mutations(space: Space) -> dict[str, Any]:
    """The options that PBT may change, as Tune's own domains."""
    found: dict[str, Any] = {}
    for name in in_flight(space):
        domain = space[name]
        assert not isinstance(domain, Choice)
        found[name] = (tune.loguniform if domain.log else tune.uniform)(domain.low, domain.high)
    return found


class Clip:
    """PBT multiplies by 0.8 or 1.2 wherever that leads: back into the domain."""

    def __init__(self, space: Space) -> None:
        self._space = dict(space)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: self._space[k].clip(v) if k in self._space else v for k, v in config.items()}


class Keeper(tune.Callback):
    """Writes what happens to the record and shows it."""

    def __init__(self, book: Record, plan: Plan, epochs: int, known: Mapping[int, Trial], watch: Watch) -> None:
        self._book, self._epochs, self._watch = book, epochs, watch
        self._known = {
            n: Trial(n, t.state, t.options, scores=dict(t.scores), folder=t.folder) for n, t in known.items()
        }
        for trial in self._known.values():
            trial.folder = trial.folder or f"{record.FOLDER}/{trial.number:04d}-{plan.token}"
        self._generation: dict[int, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, options = self._of(trial)
        mine = self._known[number]
        mine.state = "running"
        if not mine.options:
            mine.options = options
        if mine.options == options:  # others: PBT exchanged it, its first result tells from where on
            self._book.write("start", number, options=options, epoch=0, folder=mine.folder)
            self._watch.started(mine, False)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("interrupted"):
            return
        number, options = self._of(trial)
        metrics = {k: v for k, v in result.items() if "/" in k and isinstance(v, (int, float))}
        mine = self._known[number]
        mine.folder = f"{record.FOLDER}/{Path(result['run_dir']).name}"
        if result["generation"] > self._generation.get(number, 0):
            self._generation[number] = result["generation"]
            mine.options, epoch = options, result["from_epoch"]
            mine.scores = {e: s for e, s in mine.scores.items() if e <= epoch}
            self._book.write("start", number, options=options, epoch=epoch, folder=mine.folder, from_other=True)
            self._watch.started(mine, True)
        new = result[EPOCH] not in mine.scores
        mine.scores[result[EPOCH]] = result[SCORE]
        self._book.write(
            "result",
            number,
            epoch=result[EPOCH],
            step=result["step"],
            score=result[SCORE],
            metrics=metrics,
            folder=mine.folder,
        )
        if new:
            self._watch.scored(mine)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        if last.get("interrupted") or EPOCH not in last:
            return
        options = self._of(trial)[1]
        whole = options.get("train.epochs", self._epochs)
        self._end(trial, "finished" if last[EPOCH] >= whole else "stopped", "")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, _ = self._of(trial)
        error = cause(trial)
        self._book.write("retry", number, error=error)
        self._watch.retried(self._known[number], error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed", cause(trial))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._watch.tick()

    def _end(self, trial: Any, state: record.State, error: str) -> None:
        number, _ = self._of(trial)
        mine = self._known[number]
        mine.state, mine.error = state, error
        self._book.write("end", number, state=state, error=error)
        self._watch.ended(mine)

    @staticmethod
    def _of(trial: Any) -> tuple[int, dict[str, Any]]:
        return int(str(trial)), {k: v for k, v in trial.config.items() if k != _NUMBER}


def cause(trial: Any) -> str:
    """The last line of what made a trial fail: the message of the error."""
    file = Path(trial.error_file or "")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix(f"{TrialFailed.__module__}.{TrialFailed.__name__}: ")[:_CAUSE] if said else "it died"
