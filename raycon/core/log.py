"""Where a run speaks: metrics.jsonl (always), wandb (when asked), the terminal.

The training process writes lines to ``metrics.jsonl``; whoever shows progress follows that file. So one process, many
workers and a job on another machine look the same to a person.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from raycon.core.config import RunConfig, flatten, to_dict

logger = logging.getLogger("raycon")


class Tracker(Protocol):
    """Where numbers and pictures of a run also go."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def picture(self, step: int, name: str, png: bytes) -> None: ...

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Cells are text, numbers, None, or PNG pictures (bytes)."""

    def file(self, path: Path) -> None:
        """Keep a file of the run directory."""

    def close(self) -> None: ...


class Trackers:
    """Several trackers as one; none: nothing is tracked."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    def picture(self, step: int, name: str, png: bytes) -> None:
        for tracker in self._trackers:
            tracker.picture(step, name, png)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        for tracker in self._trackers:
            tracker.table(step, name, columns, rows)

    def file(self, path: Path) -> None:
        for tracker in self._trackers:
            tracker.file(path)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class NoTracker(Trackers):
    """Nothing is tracked."""


class Wandb:
    """One wandb run per run directory: a resumed run goes on in it. Offline mode needs no network.

    ``log.wandb = online`` without a way to wandb's server works offline instead, with a warning: ``wandb sync`` sends
    it later. ``rank`` above 0: a run of its own for that rank, in the same group (``log.wandb_ranks``).
    """

    def __init__(self, config: RunConfig, run_dir: Path, rank: int = 0) -> None:
        import wandb

        self._wandb, self._run_dir = wandb, run_dir
        together = run_dir.name if config.log.wandb_ranks else config.recipe
        identity, self._step = wandb_identity(run_dir, rank)
        self._run = wandb.init(
            project=config.log.project,
            group=config.log.group or together or None,
            job_type="rank" if rank else config.method.name,
            name=run_dir.name + (f"-rank{rank}" if rank else ""),
            id=identity,
            resume="allow",
            dir=str(run_dir),
            mode=wandb_mode(config.log.wandb, run_dir),
            config=flatten(to_dict(config)),
            settings=wandb.Settings(silent=True),
        )
        # Evaluations and what the report shows come after later steps: curves go by the run's own step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._log(step, numbers(values))

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._log(step, {name: self._image(png)})

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        data = [[self._image(cell) if isinstance(cell, bytes) else cell for cell in row] for row in rows]
        self._log(step, {name: self._wandb.Table(columns=list(columns), data=data)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._step += 1
        self._run.log({**values, "step": step}, step=self._step)

    def _image(self, png: bytes) -> Any:
        from PIL import Image

        return self._wandb.Image(Image.open(io.BytesIO(png)))

    def file(self, path: Path) -> None:
        self._run.save(str(path), base_path=str(self._run_dir), policy="now")

    def close(self) -> None:
        self._run.finish()


def wandb_mode(asked: Literal["online", "offline", "disabled"], run_dir: Path) -> Literal["online", "offline"]:
    """online only where it is asked for, WANDB_MODE does not say otherwise, and the server answers."""
    if asked == "online" and os.environ.get("WANDB_MODE", "online") == "online":
        if reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
            return "online"
        logger.warning("wandb cannot be reached: logging offline; later: wandb sync %s/wandb/offline-run-*", run_dir)
    return "offline"


def wandb_identity(run_dir: Path, rank: int = 0) -> tuple[str, int]:
    """(id of the wandb run of a run directory and rank, how many calls it may have had before), kept in ``.wandb*.json``.

    The id is the directory's name and a few random letters: two directories of one name (trials of two sweeps) are two
    runs. wandb drops a call that is numbered below the last, and off the net it cannot say how many a run has had; so
    each part of a resumed run begins above what the parts before it can have reached: a call per line of metrics.jsonl,
    and some pictures and tables.
    """
    own = f"-rank{rank}" if rank else ""
    file = run_dir / f".wandb{own}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
    else:
        name = re.sub(r"[^A-Za-z0-9_.=-]", "-", run_dir.name)[-64:]
        kept = {"id": f"{name}{own}-{secrets.token_hex(3)}", "calls": 0}
    before = int(kept["calls"])
    lines = sum(1 for _ in read_lines(run_dir / "metrics.jsonl"))
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(kept | {"calls": before + lines + 100}), encoding="utf-8")
    os.replace(temporary, file)
    return str(kept["id"]), before + lines + 100


class TensorBoard:
    """TensorBoard files in ``RUN_DIR/tensorboard``, written by torch's SummaryWriter or by tensorboardX."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[assignment,no-redef]
        # tensorboardX names files by the second: two writers in one second would share a file.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), filename_suffix=f".{os.getpid()}.{time.time_ns()}")
        lines = "\n".join(f"    {name}: {value}" for name, value in flatten(to_dict(config)).items())
        self._writer.add_text("config", lines, 0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As text, without columns of pictures (those come as pictures of their own)."""
        shown = [i for i in range(len(columns)) if not any(isinstance(row[i], bytes) for row in rows)]
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join(f"| {' | '.join(str(line[i]) for i in shown)} |" for line in lines)
        self._writer.add_text(name, text, step)

    def file(self, path: Path) -> None:
        """TensorBoard keeps no files."""

    def close(self) -> None:
        self._writer.close()


def tracks(config: RunConfig) -> bool:
    """Is there any tracker to be opened?"""
    return config.log.wandb != "disabled" or config.log.tensorboard


def open_tracker(config: RunConfig, run_dir: Path, rank: int = 0) -> Trackers:
    """What the options log.wandb and log.tensorboard ask for; of ranks above 0 only what log.wandb_ranks does."""
    found: list[Tracker] = []
    if config.log.wandb != "disabled" and (rank == 0 or config.log.wandb_ranks):
        found.append(Wandb(config, run_dir, rank))
    if config.log.tensorboard and rank == 0:
        found.append(TensorBoard(config, run_dir))
    return Trackers(*found)


def tracker_problems(config: RunConfig) -> list[str]:
    """Trackers that are asked for and not installed."""
    import importlib.util

    found = []
    if config.log.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        found.append(f"log.wandb = {config.log.wandb!r}: wandb is not installed; pip install 'raycon[wandb]'")
    if config.log.tensorboard and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        found.append("log.tensorboard: tensorboard is not installed; pip install 'raycon[tensorboard]'")
    return found


def publish(
    config: RunConfig,
    run_dir: Path,
    step: int = 0,
    pictures: Mapping[str, bytes] | None = None,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] | None = None,
) -> None:
    """Give the trackers what came after training: late evaluations, a table of all, and what the report shows.

    ``pictures`` (PNG) and ``tables`` (columns, rows) by name are of the checkpoint of ``step``.
    """
    if not tracks(config):
        return
    tracker = open_tracker(config, run_dir)
    try:
        relay(run_dir, tracker)
        found = [r for r in read_lines(run_dir / "metrics.jsonl") if r.get("kind") == "evaluation"]
        if found:
            names = list(dict.fromkeys(k for r in found for k in numbers(r) if "/" in k))
            rows = [[r["step"], r.get("control", "checkpoint"), *(r.get(n) for n in names)] for r in found]
            tracker.table(max(r["step"] for r in found), "evaluations", ["step", "of", *names], rows)
        for name, (columns, lines) in (tables or {}).items():
            tracker.table(step, name, columns, lines)
        for name, png in (pictures or {}).items():
            tracker.picture(step, name, png)
        if (page := run_dir / "report.html").is_file():
            tracker.file(page)
    finally:
        tracker.close()


def relay(run_dir: Path, tracker: Tracker) -> None:
    """Give a tracker the evaluations of the run that no tracker was given yet: other processes made them.

    How many were given is kept in ``.relayed``.
    """
    file = run_dir / ".relayed"
    every = [r for r in read_lines(run_dir / "metrics.jsonl") if r.get("kind") == "evaluation"]
    given = int(file.read_text(encoding="utf-8")) if file.exists() else 0
    for record in every[given:]:
        if "control" not in record:
            tracker.log(record["step"], {k: v for k, v in record.items() if "/" in k})
    if len(every) != given:
        file.write_text(str(len(every)), encoding="utf-8")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among the values."""
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Does something answer at an http(s) address?"""
    import socket
    from urllib.parse import urlsplit

    place = urlsplit(address)
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=seconds):
            return True
    except (OSError, ValueError):
        return False


class Metrics:
    """Appends one JSON object per line to metrics.jsonl; each has "kind" and "time", most have "step" and "epoch"."""

    def __init__(self, file: Path, tracker: Trackers | None = None) -> None:
        self._file = file
        self._tracker = NoTracker() if tracker is None else tracker

    def write(self, kind: str, step: int, **values: Any) -> None:
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self.append(line)
        if kind != "state":  # what is going on just now: for a display, not for curves
            self._tracker.log(step, values)

    def append(self, record: Mapping[str, Any]) -> None:
        append_line(self._file, record)

    def picture(self, step: int, file: Path) -> None:
        self._tracker.picture(step, file.stem, file.read_bytes())

    def relay(self) -> None:
        """Give the trackers the evaluations that other processes have finished meanwhile."""
        if self._tracker:
            relay(self._file.parent, self._tracker)

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
    """What every rank but the first has. ``tracker`` is given where its time goes, where there is one (log.wandb_ranks)."""

    def __init__(self, tracker: Trackers | None = None) -> None:
        self._tracker = NoTracker() if tracker is None else tracker

    def write(self, kind: str, step: int, **values: Any) -> None:
        if kind == "train":
            own = ("time/", "images_per_s", "gpu_memory_gb")
            self._tracker.log(step, {k: v for k, v in values.items() if k.startswith(own)})

    def picture(self, step: int, file: Path) -> None:
        pass

    def relay(self) -> None:
        pass

    def rewind(self, step: int) -> None:
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
    screen = Screen()
    screen.setLevel(logging.WARNING if quiet else logging.INFO)
    screen.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(screen)
    logger.propagate = False


class Screen(logging.Handler):
    """Log lines to whatever ``sys.stderr`` is at that moment: a live display puts itself there and prints them above."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # as logging's own handlers: a closed screen is no reason to stop
            self.handleError(record)


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
        if record["kind"] not in ("start", "state", "checkpoint"):
            logger.info(summary(record))

    def close(self) -> None:
        pass


class JsonDisplay:
    """Every record as one line of JSON on standard output, for programs that follow a run."""

    def show(self, record: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        pass


class Status:
    """What the lines beneath the bar say; a pure function of the records shown so far."""

    def __init__(self) -> None:
        self.training = self.mining = self.evaluation = ""
        self._evaluating: int | None = None

    def show(self, record: Mapping[str, Any]) -> None:
        kind = record["kind"]
        if kind == "train":
            said = [f"loss {record['loss']:.4g}", f"lr {record['lr']:.3g}", f"{record['images_per_s']:,.0f} images/s"]
            for name, word in (("health/effective_rank", "effective rank"), ("health/std", "spread")):
                if name in record:
                    said.append(f"{word} {record[name]:.3g}")
            if record.get("time/step", 0) > 0 and "time/data" in record:
                said.append(f"waiting for data {record['time/data'] / record['time/step']:.0%}")
            if "gpu_memory_gb" in record:
                said.append(f"GPU {record['gpu_memory_gb']:.1f} GB")
            self.training = "  ".join(said)
            if self.mining.endswith("..."):
                self.mining = ""
        elif kind == "state" and "mining" in record:
            self.mining = f"mining for epoch {record['mining'] + 1} ..."
        elif kind == "state" and "evaluating" in record:
            self._evaluating = record["evaluating"]
            self.evaluation = f"step {self._evaluating} is to be evaluated ..."
        elif kind == "snapshot":
            used = [f"{v:.0f}" for k, v in sorted(record.items()) if k.endswith("/used")]
            clusters = f", clusters in use {', '.join(used)}" if used else ""
            self.mining = f"mined snapshot {record['version']} in {record['seconds']:.1f} s{clusters}"
        elif kind == "evaluation" and "control" not in record:
            top = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if "/top1" in k or "/recall_at_1" in k)
            self.evaluation = f"evaluated step {record['step']}: {top}"

    def lines(self) -> list[str]:
        return [line for line in (self.training, self.mining, self.evaluation) if line]


class RichDisplay:
    """A progress bar with the time left, and beneath it the latest numbers, mining and evaluation; events scroll above."""

    def __init__(self) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        self._group, self._text = Group, Text
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._progress.add_task("starting", total=1, left="")
        self._status = Status()
        self._live = Live(self._progress, refresh_per_second=4)
        self._live.start()

    def show(self, record: Mapping[str, Any]) -> None:
        self._status.show(record)
        if record["kind"] == "start":
            self._progress.update(self._task, total=record["steps"], completed=record["step"], description="pretrain")
        elif record["kind"] == "train":
            left = record.get("eta_s")
            self._progress.update(
                self._task,
                completed=record["step"],
                description=f"epoch {record['epoch'] + 1}/{record['epochs']}",
                left="" if left is None else f"{_duration(left)} left",
            )
        elif record["kind"] in ("event", "evaluation"):
            self._live.console.print(summary(record), highlight=False)
        lines = [self._text("  " + line, overflow="ellipsis", no_wrap=True) for line in self._status.lines()]
        self._live.update(self._group(self._progress, *lines))

    def close(self) -> None:
        self._live.stop()


class Quiet:
    def show(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Displays:
    """Several displays as one."""

    def __init__(self, *displays: Display) -> None:
        self._displays = displays

    def show(self, record: Mapping[str, Any]) -> None:
        for shown in self._displays:
            shown.show(record)

    def close(self) -> None:
        for shown in self._displays:
            shown.close()


def display(quiet: bool, as_json: bool = False) -> Display:
    """JSON lines when asked for; else nothing when quiet, a live display on a terminal, plain lines otherwise."""
    if as_json:
        return JsonDisplay()
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
