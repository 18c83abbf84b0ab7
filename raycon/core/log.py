"""Where a run speaks: metrics.jsonl (always), wandb (when asked), the terminal.

The training process writes lines to ``metrics.jsonl``; whoever shows progress follows that file. So one process, many
workers and a job on another machine look the same to a person.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from raycon.core.config import RunConfig, flatten, to_dict

logger = logging.getLogger("raycon")


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def picture(self, step: int, name: str, file: Path) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """wandb switched off."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def picture(self, step: int, name: str, file: Path) -> None:
        pass

    def close(self) -> None:
        pass


class Wandb:
    """One wandb run per run directory: a resumed run goes on in it. Offline mode needs no network."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.log.project,
            name=run_dir.name,
            group=config.log.group or None,
            id=run_dir.name[-64:].replace("/", "-"),
            resume="allow",
            dir=str(run_dir),
            mode=config.log.wandb,
            config=flatten(to_dict(config)),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in values.items() if isinstance(v, (int, float))} | {"step": step})

    def picture(self, step: int, name: str, file: Path) -> None:
        self._run.log({name: self._wandb.Image(str(file)), "step": step})

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """Appends one JSON object per line to metrics.jsonl; each has "kind" and "time", most have "step" and "epoch"."""

    def __init__(self, file: Path, tracker: Tracker | None = None) -> None:
        self._file = file
        self._tracker = tracker or NoTracker()

    def write(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        append_line(self._file, line)
        self._tracker.log(step, values)

    def picture(self, step: int, file: Path) -> None:
        self._tracker.picture(step, file.stem, file)

    def rewind(self, step: int) -> None:
        """Drop the training lines after ``step``: a resumed run makes them again, and no step appears twice."""
        if not self._file.exists():
            return
        kept = [r for r in read_lines(self._file) if r.get("kind") == "evaluation" or r.get("step", 0) <= step]
        temporary = self._file.with_suffix(".part")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, self._file)

    def close(self) -> None:
        self._tracker.close()


class NoMetrics(Metrics):
    """What every rank but the first has."""

    def __init__(self) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> None:
        pass

    def picture(self, step: int, file: Path) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """One line in one write: lines of several processes do not mix."""
    data = (json.dumps(record, default=float) + "\n").encode()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a torn last line is left out."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as handle:
        for line in handle:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def attach_log_file(run_dir: Path, quiet: bool) -> None:
    """raycon's log lines go to log.txt of the run and, warnings only when quiet, to standard error."""
    logger.setLevel(logging.INFO)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING if quiet else logging.INFO)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    logger.propagate = False


class Display(Protocol):
    def show(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def summary(record: Mapping[str, Any]) -> str:
    """One record of metrics.jsonl as one readable line."""
    kind = record["kind"]
    if kind == "train":
        left = record.get("eta_s")
        eta = "" if left is None else f"  {_duration(left)} left"
        return (
            f"epoch {record['epoch'] + 1}  step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  "
            f"lr {record['lr']:.4g}  {record['images_per_s']:,.0f} images/s{eta}"
        )
    if kind == "snapshot":
        used = [f"{v:.0f}" for k, v in sorted(record.items()) if k.endswith("/used")]
        clusters = f", clusters in use: {', '.join(used)}" if used else ""
        return f"epoch {record['epoch'] + 1}  mined snapshot {record['version']} in {record['seconds']:.1f} s{clusters}"
    if kind == "evaluation":
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if "/top1" in k)
        return f"evaluated step {record['step']}: {numbers}"
    return str(record.get("text", kind))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainDisplay:
    """Log lines: an event as it comes, training at most every ``every_s`` seconds."""

    def __init__(self, every_s: float = 15.0) -> None:
        self._every_s = every_s
        self._last = 0.0

    def show(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if record["kind"] == "train":
            if now - self._last < self._every_s and record["step"] < record["steps"]:
                return
            self._last = now
        if record["kind"] != "start":
            logger.info(summary(record))

    def close(self) -> None:
        pass


class RichDisplay:
    """A progress bar with the latest numbers beneath; events scroll above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            transient=False,
        )
        self._task = self._progress.add_task("starting", total=1, numbers="")
        self._progress.start()

    def show(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "start":
            self._progress.update(self._task, total=record["steps"], completed=record["step"], description="pretrain")
        elif record["kind"] == "train":
            numbers = f"loss {record['loss']:.3f}  {record['images_per_s']:,.0f} images/s"
            self._progress.update(
                self._task,
                completed=record["step"],
                description=f"epoch {record['epoch'] + 1}/{record['epochs']}",
                numbers=numbers,
            )
        else:
            self._progress.console.print(summary(record), highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Quiet:
    def show(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def display(quiet: bool) -> Display:
    """A live display on a terminal, plain lines otherwise."""
    if quiet:
        return Quiet()
    return RichDisplay() if sys.stderr.isatty() and sys.stdout.isatty() else PlainDisplay()


class Follower:
    """Shows the lines of a metrics file as they are written, from a thread."""

    def __init__(self, file: Path, shown: Display, poll_s: float = 0.5) -> None:
        self._file, self._shown, self._poll_s = file, shown, poll_s
        self._done = threading.Event()
        self._position = file.stat().st_size if file.exists() else 0
        self._thread = threading.Thread(target=self._follow, name="raycon-progress", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()
        self._shown.close()

    def _follow(self) -> None:
        while not self._done.wait(self._poll_s):
            self._read()

    def _read(self) -> None:
        if not self._file.exists():
            return
        if self._file.stat().st_size < self._position:  # rewound by a resume
            self._position = self._file.stat().st_size
        with self._file.open("rb") as handle:
            handle.seek(self._position)
            while (line := handle.readline()).endswith(b"\n"):
                self._position = handle.tell()
                try:
                    self._shown.show(json.loads(line))
                except (ValueError, KeyError):  # a line of another version is not worth a crash
                    continue
