"""What a sweep keeps on disk, and nothing else of it is ever read back: plain YAML and JSON.

DIR/sweep.yaml       the study, its settings, its space, the base configuration
DIR/trials.jsonl     what happened to the trials, a line each: start, result, retry, end
DIR/trials/0003-ab12cd/   a whole run directory per trial (``.1``, ``.2``: after exchanges of PBT)
DIR/best.yaml        the best configuration, for python -m raycon.pretrain --config
DIR/report.html      python -m raycon.tuning.report DIR writes it again
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raycon import methods
from raycon.core.config import ConfigError, from_dict, read_tree, to_dict
from raycon.core.log import append_line, read_lines

from .space import parse_domain
from .study import Study

SETTINGS, TRIALS, FOLDER, BEST, STOP = "sweep.yaml", "trials.jsonl", "trials", "best.yaml", "stop"
FORMAT = 1

State = Literal["waiting", "running", "finished", "stopped", "failed"]
ENDED: tuple[State, ...] = ("finished", "stopped", "failed")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep as it was asked for."""

    name: str
    """Of the study."""
    token: str
    """Makes the names of trials unique on a cluster."""
    study: Study


@dataclass
class Trial:
    """One trial, as the record tells it."""

    number: int
    state: State = "waiting"
    options: dict[str, Any] = field(default_factory=dict)
    """Those in force, or at the end."""
    history: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(epoch from which on, options): more than one entry when PBT changed them."""
    scores: dict[int, float] = field(default_factory=dict)
    """By epochs trained."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All numbers of the last evaluation."""
    folder: str = ""
    """The run directory, below that of the sweep."""
    seconds: float = 0.0
    """Wall time from start to end, over all sessions; of a running one to its last result."""
    retries: int = 0
    error: str = ""

    @property
    def epoch(self) -> int:
        return max(self.scores, default=0)

    @property
    def score(self) -> float | None:
        """The last one: the best of several would flatter a trial that was scored more often."""
        return self.scores[self.epoch] if self.scores else None


def create(folder: Path, plan: Plan) -> None:
    """Begin the record of a sweep. Raises ConfigError when ``folder`` holds one."""
    import yaml

    if (folder / SETTINGS).exists():
        raise ConfigError([f"--dir {folder} holds a sweep: go on with --resume {folder}, or give another directory"])
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    study = plan.study
    settings = {f.name: getattr(study, f.name) for f in dataclasses.fields(study) if f.name not in ("base", "space")}
    tree = {
        "format": FORMAT,
        "study": plan.name,
        "token": plan.token,
        "settings": settings,
        "space": {name: str(domain) for name, domain in study.space.items()},
        "config": to_dict(study.base),
    }
    (folder / SETTINGS).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def new_plan(name: str, study: Study) -> Plan:
    return Plan(name=name, token=secrets.token_hex(3), study=study)


def open_plan(folder: Path) -> Plan:
    """The sweep of a directory. Raises ConfigError when there is none or its settings are damaged."""
    file = folder / SETTINGS
    if not file.exists():
        raise ConfigError([f"{folder} holds no sweep (no {SETTINGS}); give the --dir of one"])
    tree = read_tree(file)
    try:
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ConfigError([f"{file} holds no sweep of format {FORMAT}"])
        base = from_dict(tree["config"], methods.options(tree["config"]["method"]["name"]))
        space = {name: parse_domain(text) for name, text in tree["space"].items()}
        return Plan(name=tree["study"], token=tree["token"], study=Study(base=base, space=space, **tree["settings"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{file} cannot be read: {type(error).__name__}: {error}"]) from None


class Record:
    """Writes ``trials.jsonl``; one process does."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / TRIALS

    def write(self, event: str, trial: int = -1, **values: Any) -> None:
        append_line(self._file, {"event": event, "trial": trial, "time": round(time.time(), 3), **values})


def read_trials(folder: Path, study: Study) -> dict[int, Trial]:
    """The trials of a sweep by number, from its record; what never started is "waiting" without options.

    The same result told twice (a trial that went on after a crash) counts once, the later one.
    """
    trials = {number: Trial(number) for number in range(study.trials)}
    began: dict[int, float] = {}
    for line in read_lines(folder / TRIALS):
        event, number, when = line.get("event"), line.get("trial"), line.get("time")
        if event in ("session", "pause"):  # whatever ran then was cut off
            began.clear()
            for trial in trials.values():
                trial.state = "waiting" if trial.state == "running" else trial.state
        if number not in trials or not isinstance(when, (int, float)):
            continue
        trial = trials[number]
        if number in began:
            trial.seconds += when - began[number]
            began[number] = when
        if event == "start":
            began[number] = when
            trial.state, trial.folder, trial.error = "running", line["folder"], ""
            trial.options = line["options"]
            epoch = line.get("epoch", 0)
            if not trial.history or trial.history[-1][1] != trial.options:
                trial.history = [(e, o) for e, o in trial.history if e < epoch] + [(epoch, trial.options)]
            if line.get("from_other"):  # the weights of another trial: its own later scores are void
                trial.scores = {e: s for e, s in trial.scores.items() if e <= epoch}
        elif event == "result":
            trial.scores[int(line["epoch"])] = float(line["score"])
            trial.metrics = line.get("metrics", {})
        elif event == "retry":
            trial.retries, trial.error = trial.retries + 1, line.get("error", "")
        elif event == "end":
            trial.state, trial.error = line["state"], line.get("error", "")
            began.pop(number, None)
    return trials


def best_of(trials: Mapping[int, Trial], mode: str) -> Trial | None:
    """The trial with the best last score among those that trained to the end; among all when none did."""
    scored = [t for t in trials.values() if t.score is not None and math.isfinite(t.score)]
    whole = [t for t in scored if t.state == "finished"] or scored
    sign = 1.0 if mode == "max" else -1.0
    return max(whole, key=lambda t: sign * (t.score or 0.0), default=None)
