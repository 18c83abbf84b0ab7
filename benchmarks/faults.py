"""Faults: what a checkpoint costs, how long a run takes to come back, and a soak of random faults.

python -m benchmarks.faults [--quick] [--json FILE]      checkpoint cost; recovery from a lost worker, shard, driver
python -m benchmarks.faults --soak [--faults N] [--seed S] [--minutes M]
                                                         at least N random faults over one run; the weights at the
                                                         end must be those of a run that nothing happened to

A recovery time is wall time from the kill to the next step that is written; it holds for the machine it was taken on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row
from raycon.core.log import read_lines

OPTIONS = [
    "quickstart", "--method.warmup-epochs=2", "--train.warmup-epochs=1", "--method.clusters", "60", "100",
    "--data.loader=torch", "--mining.redo=1", "--mining.iterations=4", "--log.every-steps=1", "--log.quiet",
    "--log.report=light", "--checkpoint.every-steps=5", "--evals.names",
]  # fmt: skip
KINDS = ("worker 0", "worker 1", "both workers", "writer", "driver", "job")
"""One rank; all; rank 0 while it writes a checkpoint; the driver alone; the driver and all it started."""


# --- a run as processes -----------------------------------------------------------------------------------------


class Run:
    """A run with its own Ray on this machine, started again by the same command when it was killed."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.folder = folder
        self._command = [sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--train.epochs={epochs}"]
        self._command += [f"--run.dir={folder}", "--scaling.max-failures=-1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "150"}
        self._environment = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
        self._log = folder.with_suffix(".log").open("a")
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def steps(self) -> list[int]:
        file = self.folder / "metrics.jsonl"
        return [r["step"] for r in read_lines(file) if r["kind"] == "train"] if file.exists() else []

    def ranks(self) -> list[int]:
        found = [r["pids"] for r in read_lines(self.folder / "metrics.jsonl") if r["kind"] == "start"]
        return list(found[-1])

    def begins(self) -> int:
        file = self.folder / "metrics.jsonl"
        return sum(r["kind"] == "start" for r in read_lines(file)) if file.exists() else 0

    def until(self, condition: Callable[[], bool], seconds: float = 600, every: float = 0.1) -> bool:
        """False when the run ended before. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                raise TimeoutError(f"the run stands still; see {self._log.name}")
            threading.Event().wait(every)
        return True

    def kill(self, kind: str) -> bool:
        """Do one of KINDS; False when the run ended before it could be done."""
        if kind == "writer" and not self.until(lambda: any(self.folder.glob("checkpoints/.*.part")), every=0.001):
            return False
        ranks = self.ranks()
        victims = {
            "worker 0": ranks[:1], "worker 1": ranks[-1:], "both workers": ranks, "writer": ranks[:1],
            "driver": [], "job": ranks,
        }[kind]  # fmt: skip
        if kind == "job":
            os.killpg(self.process.pid, signal.SIGKILL)
        if kind == "driver":
            self.process.kill()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if kind in ("driver", "job"):
            self.process.wait(60)
            self.start()
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
        self._log.close()


def _longer(run: Run, lines: int) -> bool:
    return len(run.steps()) >= lines


def _at(run: Run, step: int) -> bool:
    return (run.steps() or [0])[-1] >= step


def _begun(run: Run, begins: int) -> bool:
    return run.begins() > begins


def reference(folder: Path, epochs: int) -> None:
    """The same run on two ranks without Ray, which nothing happens to."""
    prefix = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    run = [*prefix, sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--train.epochs={epochs}"]
    run += [f"--run.dir={folder}", "--runtime=local"]
    subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=1800, check=True)


# --- what is measured -------------------------------------------------------------------------------------------


def checkpoint_cost(quick: bool) -> list[Row]:
    """CPU seconds of saving the published ResNet-50 PCL's state once, against a minute of training."""
    import torch

    from raycon.core.config import ModelConfig
    from raycon.nn import networks
    from raycon.training import checkpoint

    rows = []
    for name in ("resnet18",) if quick else ("resnet18", "resnet50"):
        encoder = networks.build_encoder(ModelConfig(encoder=name, weights=""), 3)
        pair = torch.nn.ModuleDict(
            {"student": encoder, "teacher": networks.build_encoder(ModelConfig(encoder=name), 3)}
        )
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        seconds, wall = [], []
        with tempfile.TemporaryDirectory() as folder:
            for step in range(3 if quick else 5):
                cpu, clock = time.process_time(), time.perf_counter()
                checkpoint.save(Path(folder), pair, optimizer, None, {"step": step, "evaluate": False})
                seconds.append(time.process_time() - cpu)
                wall.append(time.perf_counter() - clock)
        rows.append(harness.at_most(f"{name}: saving once a minute, CPU s of 60", sorted(seconds)[1], 60.0, 0.02))
        rows.append(harness.shown(f"{name}: saving once, wall s of 60", sorted(wall)[1], 60.0))
    return rows


def recovery(quick: bool) -> list[Row]:
    """Wall seconds from a kill to the next written step; `other` is the run's own start, to its first step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        run = Run(Path(folder) / "run", epochs=400)
        try:
            run.until(lambda: len(run.steps()) >= 1)
            start = time.monotonic() - begin
            for kind in ("worker 1",) if quick else ("worker 1", "writer", "job"):
                stood, begins = len(run.steps()), run.begins()
                run.until(partial(_longer, run, stood + 12))
                run.kill(kind)
                killed = time.monotonic()
                run.until(partial(_begun, run, begins))
                run.until(partial(_longer, run, len(run.steps()) + 1))
                rows.append(harness.shown(f"{kind} killed: s to the next step", time.monotonic() - killed, start))
        finally:
            run.close()
    return rows


def soak(faults: int, seed: int, minutes: float) -> int:
    """Random faults at random steps, the same ones for a seed; 0 when the run ends with the reference's bits."""
    choose = random.Random(seed)
    plan = [(choose.choice(KINDS), choose.randint(3, 12)) for _ in range(faults)]
    epochs = max(5, -(-sum(steps for _, steps in plan) // 11) + 4)  # each fault costs what was not saved yet
    end = time.monotonic() + 60 * minutes
    done: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", epochs)
        try:
            for kind, steps in plan:
                before, begins = (run.steps() or [0])[-1], run.begins()
                alive = run.until(partial(_at, run, before + steps))
                if not alive or not run.kill(kind):
                    break
                done[kind] = done.get(kind, 0) + 1
                told = ", ".join(f"{n} x {k}" for k, n in done.items())
                sys.stdout.write(f"{sum(done.values())} of {faults} faults at step {before + steps}: {told}\n")
                sys.stdout.flush()
                if time.monotonic() > end:
                    break
                run.until(partial(_begun, run, begins))
            status = run.process.wait(1800)
        finally:
            run.close()
        reference(Path(folder) / "reference", epochs)
        same = status == 0 and identical(run.folder, Path(folder) / "reference")
        survived = sum(done.values())
    sys.stdout.write(
        f"survived {survived} faults ({done}), seed {seed}: {'the same bits' if same else 'NOT the same'}\n"
    )
    return 0 if same and survived >= faults else 1


def identical(folder: Path, other: Path) -> bool:
    name = "checkpoints/last/model.safetensors"
    lines = [[(r["step"], r["loss"]) for r in read_lines(f / "metrics.jsonl") if r["kind"] == "train"] for f in (folder, other)]  # fmt: skip
    return lines[0] == lines[1] and (folder / name).read_bytes() == (other / name).read_bytes()


def measure(quick: bool) -> list[Row]:
    return checkpoint_cost(quick) + recovery(quick)


def main(argv: list[str] | None = None) -> Any:
    arguments = sys.argv[1:] if argv is None else argv
    if "--soak" not in arguments:
        return harness.main(__doc__ or "", measure, arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more faults after so long")
    asked = parser.parse_args(arguments)
    sys.exit(soak(asked.faults, asked.seed, asked.minutes))


if __name__ == "__main__":
    main()
