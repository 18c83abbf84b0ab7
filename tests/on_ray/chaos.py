"""Runs as processes that are disturbed, and what is held against one that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machines import Head, Machines
from raycon.core.log import read_lines

STEPS = 55
OPTIONS = [
    "quickstart", "--train.epochs=5", "--method.warmup-epochs=2", "--train.warmup-epochs=1", "--method.clusters", "60", "100",
    "--data.loader=torch", "--mining.redo=1", "--mining.iterations=4", "--log.every-steps=1",
    "--checkpoint.every-steps=5", "--checkpoint.keep=0", "--evals.names", "knn", "--evals.every-epochs=2",
    "--log.report=light", "--log.quiet",
]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [r for r in read_lines(file) if r["kind"] == kind] if file.exists() else []


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(folder, "train")]


def step_of(folder: Path) -> int:
    return max((step for step, _ in losses(folder)), default=0)


def events(folder: Path) -> str:
    return "\n".join(r["text"] for r in records(folder, "event"))


def same(folder: Path, other: Path) -> None:
    name = "checkpoints/last/model.safetensors"
    assert losses(folder) == losses(other)
    assert (folder / name).read_bytes() == (other / name).read_bytes()


class Job:
    """``with Job(machines, folder, option ...) as job``: a run on the cluster."""

    def __init__(self, machines: Machines | Head, folder: Path, *more: str) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--run.dir={folder}", *more]
        self.environment = environment() | {"RAY_ADDRESS": machines.address}
        self.log = folder.with_suffix(".log")

    def __enter__(self) -> Job:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 500, every: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"{what}: ended with {self.process.returncode}\n{self.log.read_text()}"
            assert time.monotonic() < end, (
                f"{what}: not within {seconds} s\n{self.log.read_text()}\n{events(self.folder)}"
            )
            threading.Event().wait(every)

    def ended(self, seconds: float = 600) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text() + events(self.folder)

    def ranks(self) -> list[int]:
        return list(records(self.folder, "start")[-1]["pids"])
