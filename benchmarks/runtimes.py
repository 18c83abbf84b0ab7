"""Ray's price: the same job under Ray Train x2 and torchrun x2, in turns, on the same two cores.

    python -m benchmarks.runtimes [--quick] [--json FILE]

Steady step times are medians of ``time/step`` after the first 30 steps; both give the same losses, which is checked.
Also: the largest memory of the process tree (proportional set size), seconds from start to the first step, and seconds
from kill -9 of a rank to the next training step.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from raycon.core.log import read_lines

OPTIONS = [
    "fashion-mnist-moco-cpu",
    "--data.loader=torch",
    "--log.every-steps=10",
    "--log.quiet",
    "--evals.names",
]
SIDES = {
    "ray": [sys.executable, "-m", "raycon.pretrain", *OPTIONS],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"),
        *(sys.executable, "-m", "raycon.pretrain", *OPTIONS, "--runtime=local"),
    ],
}


class Measured:
    """One run of one side."""

    def __init__(self, side: str, epochs: int, folder: Path, kill_at: int = 0) -> None:
        self.folder = folder
        self.peak_mb = 0.0
        started = time.time()
        command = [*SIDES[side], f"--train.epochs={epochs}", "--train.warmup-epochs=0", f"--run.dir={folder}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            watch = threading.Thread(target=self._watch, args=(process,), daemon=True)
            watch.start()
            self.killed = self._kill(process, kill_at) if kill_at else 0.0
            status = process.wait()
            watch.join()
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with {status}")
        train = self.lines("train")
        self.step = statistics.median(r["time/step"] for r in train if r["step"] > 30)
        self.losses = [r["loss"] for r in train]
        self.start = train[0]["time"] - train[0]["step"] * train[0]["time/step"] - started

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [r for r in read_lines(self.folder / "metrics.jsonl") if r["kind"] == kind]

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        import psutil

        while process.poll() is None:
            total = 0
            try:
                root = psutil.Process(process.pid)
                for child in [root, *root.children(recursive=True)]:
                    total += child.memory_full_info().pss
            except psutil.Error:
                pass
            self.peak_mb = max(self.peak_mb, total / 1e6)
            time.sleep(1.0)

    def _kill(self, process: subprocess.Popen[bytes], step: int) -> float:
        while not any(r["step"] >= step for r in self.lines("train")):
            if process.poll() is not None:
                raise RuntimeError("the run ended before it could be disturbed")
            time.sleep(0.05)
        os.kill(self.lines("start")[-1]["pids"][1], signal.SIGKILL)
        return time.time()

    def recovery(self) -> float:
        """Seconds from the kill to the first training step after it."""
        again = self.lines("start")[-1]["time"]
        first = next(r for r in self.lines("train") if r["time"] > again)
        return float(first["time"]) - self.killed


def measure(quick: bool) -> list[harness.Row]:
    epochs, repeats = (1, 1) if quick else (1, 3)
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for side in SIDES:
                runs[side].append(Measured(side, epochs, Path(folder) / f"{side}-{turn}"))
        if len({json.dumps(r.losses) for side in runs.values() for r in side}) != 1:
            raise RuntimeError("the two runtimes did not give the same losses")
        disturbed = None if quick else Measured("ray", 2, Path(folder) / "killed", kill_at=260)

    def median(side: str, name: str) -> float:
        return statistics.median(getattr(r, name) for r in runs[side])

    rows = [
        harness.at_most("step under Ray Train / torchrun (s)", median("ray", "step"), median("torchrun", "step"), 1.03),
        harness.at_most(
            "seconds to the first step, Ray / torchrun", median("ray", "start"), median("torchrun", "start"), 10
        ),
        harness.at_most(
            "peak memory of all processes (MB), Ray / torchrun",
            median("ray", "peak_mb"),
            median("torchrun", "peak_mb"),
            5,
        ),
    ]
    if disturbed is not None:
        rows.append(
            harness.at_most(
                "seconds from kill -9 to the next step / start", disturbed.recovery(), median("ray", "start"), 2
            )
        )
    return rows


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
