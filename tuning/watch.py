"""What a person sees of a sweep: a live table of the trials on a terminal, lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raycon.core.log import read_lines

from .record import ENDED, Trial, best_of

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("raycon")

_TAIL = 4096


class Watch(Protocol):
    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def started(self, trial: Trial, exchanged: bool) -> None: ...

    def scored(self, trial: Trial) -> None: ...

    def retried(self, trial: Trial, error: str) -> None: ...

    def ended(self, trial: Trial) -> None: ...

    def tick(self) -> None:
        """Called often."""
        ...


def words(options: Mapping[str, Any]) -> str:
    """method.temperature=0.1234 train.lr=0.06"""
    return " ".join(f"{name}={short(value)}" for name, value in options.items())


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")


class Lines:
    """A line per event, on the raycon logger."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, trial: Trial, exchanged: bool) -> None:
        how = "goes on from another trial's checkpoint with" if exchanged else "started with"
        logger.info("trial %d %s %s", trial.number, how, words(trial.options))

    def scored(self, trial: Trial) -> None:
        logger.info("trial %d after %d epochs: %s %.4g", trial.number, trial.epoch, self._metric, trial.score)

    def retried(self, trial: Trial, error: str) -> None:
        logger.info("trial %d crashed and is started again: %s", trial.number, error)

    def ended(self, trial: Trial) -> None:
        logger.info(
            "trial %d %s after %d epochs%s", trial.number, trial.state, trial.epoch, trial.error and f": {trial.error}"
        )

    def tick(self) -> None:
        pass


class LiveTable:
    """All trials, drawn again twice a second at most."""

    def __init__(
        self, title: str, metric: str, mode: str, epochs: int, folder: Path, trials: Mapping[int, Trial]
    ) -> None:
        from rich.live import Live

        self._title, self._metric, self._mode, self._epochs, self._folder = title, metric, mode, epochs, folder
        self._trials = dict(trials)
        self._since: dict[int, float] = {}
        self._drawn = 0.0
        self._live = Live(self._table(), refresh_per_second=2, transient=False)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update(self._table())
        self._live.stop()

    def started(self, trial: Trial, exchanged: bool) -> None:
        self._since[trial.number] = time.monotonic()
        self._trials[trial.number] = trial

    def scored(self, trial: Trial) -> None:
        self._trials[trial.number] = trial

    def retried(self, trial: Trial, error: str) -> None:
        self._live.console.print(f"trial {trial.number} crashed and is started again: {error}", highlight=False)

    def ended(self, trial: Trial) -> None:
        self._trials[trial.number] = trial
        if trial.error:
            self._live.console.print(f"trial {trial.number} failed: {trial.error}", highlight=False)

    def tick(self) -> None:
        if time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._live.update(self._table())

    def _table(self) -> Table:
        return table(self._title, self._metric, self._mode, self._epochs, self._trials, self._progress)

    def _progress(self, trial: Trial) -> str:
        if trial.state != "running" or not trial.folder:
            return ""
        line = last_step(self._folder / trial.folder / "metrics.jsonl")
        return "" if line is None else f"step {line['step']}/{line['steps']}"


def last_step(file: Path) -> dict[str, Any] | None:
    """The newest training line of a run, read from the end of its file."""
    import json

    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - _TAIL))
            lines = handle.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("kind") == "train":
            return found
    return None


def table(title: str, metric: str, mode: str, epochs: int, trials: Mapping[int, Trial], progress: Any = None) -> Table:
    """The trials, the best one marked; those that run first, then by score."""
    from rich.table import Table

    best = best_of(trials, mode)
    names = list(dict.fromkeys(name for t in trials.values() for name in t.options))
    made = Table(title=title, title_justify="left")
    for head in ("trial", "state", "epochs"):
        made.add_column(head, justify="right" if head != "state" else "left")
    made.add_column(metric, justify="right")
    for name in names:
        made.add_column(name.removeprefix("method."), justify="right")
    made.add_column("")
    sign = -1.0 if mode == "max" else 1.0

    def order(trial: Trial) -> tuple[bool, float, int]:
        return trial.state in ENDED, sign * trial.score if trial.score is not None else float("inf"), trial.number

    for trial in sorted(trials.values(), key=order):
        made.add_row(
            str(trial.number),
            trial.state,
            f"{trial.epoch}/{epochs}",
            "" if trial.score is None else f"{trial.score:.2f}",
            *(short(trial.options[name]) if name in trial.options else "" for name in names),
            "best" if trial is best else progress(trial) if progress else trial.error[:40],
            style="bold" if trial is best else "red" if trial.state == "failed" else "",
        )
    return made


def watch(
    title: str, metric: str, mode: str, epochs: int, folder: Path, trials: Mapping[int, Trial], quiet: bool
) -> Watch:
    """A live table on a terminal, lines otherwise."""
    if sys.stdout.isatty() and sys.stderr.isatty() and not quiet:
        return LiveTable(title, metric, mode, epochs, folder, trials)
    return Lines(metric)


def steps_trained(run_dir: Path) -> tuple[int, int]:
    """(steps this run directory trained, steps of the whole run), from its metrics.jsonl."""
    first, last, whole = None, 0, 0
    for line in read_lines(run_dir / "metrics.jsonl"):
        if line.get("kind") == "start" and first is None:
            first = line["step"]
        if line.get("kind") == "train":
            last, whole = max(last, line["step"]), line["steps"]
    return max(0, last - (first or 0)), whole
