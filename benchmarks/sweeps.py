"""What a trial of a sweep costs beside the same run alone: the same training, led by Ray Tune or by pretrain.

    python -m benchmarks.sweeps [--quick] [--json FILE]

In turns: a sweep of one trial, a sweep of three (two with --quick) one after another, and trial 0's own configuration by
``python -m raycon.pretrain``: one worker, one epoch of Fashion-MNIST (a quarter of its training images), the same evaluation.
What a trial adds is the larger sweep less the smaller one, divided by the number of trials between. CPU seconds are of all
processes, Ray's own included, read four times a second: of each process at most its last quarter second is missing. The
losses of trial 0 and of the run alone must be the same numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from raycon.core.log import read_lines

SWEEP = [
    *(sys.executable, "-m", "raycon.tuning.sweep", "fashion-temperature", "--quiet"),
    *("--searcher=random", "--scheduler=none", "--max-concurrent=1"),
    *("--train.epochs=1", "--train.warmup-epochs=0", "--data.loader=torch", "--log.every-steps=5"),
]
ALONE = [sys.executable, "-m", "raycon.pretrain", "--log.quiet"]
_LOOK_S = 0.25


class Spent(NamedTuple):
    """By a command and all processes below it."""

    wall_s: float
    cpu_s: float


def spend(command: Sequence[str]) -> Spent:
    """Run a command to its end. Raises RuntimeError when it fails."""
    import psutil

    cpu: dict[tuple[int, float], float] = {}
    started = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # it ended while it was looked at
                for one in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        used = one.cpu_times()
                        cpu[one.pid, one.create_time()] = used.user + used.system
            time.sleep(_LOOK_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Spent(time.perf_counter() - started, sum(cpu.values()))


class Run(NamedTuple):
    """What a run directory tells of its training."""

    losses: list[float]
    step_s: float


def trained(run_dir: Path) -> Run:
    train = [r for r in read_lines(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    return Run([r["loss"] for r in train], statistics.median(r["time/step"] for r in train if r["step"] > 30))


def measure(quick: bool) -> list[harness.Row]:
    repeats, many = (1, 2) if quick else (3, 3)
    one: list[Spent] = []
    more: list[Spent] = []
    alone: list[Spent] = []
    steps: dict[str, list[float]] = {"trial": [], "alone": []}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(repeats):
            sweep, larger, run = (Path(place) / f"{name}-{turn}" for name in ("one", "more", "alone"))
            one.append(spend([*SWEEP, "--trials=1", f"--dir={sweep}"]))
            (trial,) = (sweep / "trials").glob("0000-*")
            alone.append(spend([*ALONE, "--config", str(trial / "config.yaml"), f"--run.dir={run}"]))
            more.append(spend([*SWEEP, f"--trials={many}", f"--dir={larger}"]))
            led, own = trained(trial), trained(run)
            if led.losses != own.losses:
                raise RuntimeError("a trial and the same run alone did not give the same losses")
            steps["trial"].append(led.step_s)
            steps["alone"].append(own.step_s)
            for folder in (sweep, larger, run):
                shutil.rmtree(folder)
    rows = []
    for unit, field in (("CPU s", "cpu_s"), ("wall s", "wall_s")):
        whole = statistics.median(getattr(s, field) for s in one)
        another = statistics.median(
            (getattr(m, field) - getattr(o, field)) / (many - 1) for m, o in zip(more, one, strict=True)
        )
        same = statistics.median(getattr(s, field) for s in alone)
        rows.append(harness.shown(f"a sweep of one trial / the same run alone ({unit})", whole, same))
        rows.append(harness.shown(f"each further trial / the same run alone ({unit})", another, same))
    led_s, own_s = (statistics.median(steps[side]) for side in ("trial", "alone"))
    return [*rows, harness.at_most("step of a trial / of the same run alone (s)", led_s, own_s, 1.03)]


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
