"""Ray's price: the same job under Ray Train x2, torchrun x2 and one process, in turns, on the same two cores.

    python -m benchmarks.runtimes [--quick] [--json FILE]

Two workers have a thread each, the one process has two: all fill both cores, and what Ray's own processes take is
taken from the ranks. One rank of one thread, under Ray Train and alone, leaves a core for them, as a machine of many
cores does. A step's wall seconds are medians over intervals of ten steps after the first 30; its CPU seconds (of the
ranks, whatever their threads do) are the slope of the kernel's count over the steps: right also where other work
shares the cores, which hits Ray's workers first because Ray runs them at a lower priority. Ray and torchrun give the
same losses, which is checked. Also: seconds from start to the first step, and the largest memory of the process tree
(proportional set size).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from raycon.core.log import read_lines

OPTIONS = [
    "fashion-mnist-moco-cpu",
    "--data.loader=torch",
    "--log.every-steps=10",
    "--log.quiet",
    "--evals.names",
    "--train.epochs=1",
    "--train.warmup-epochs=0",
]
PROGRAM = [sys.executable, "-m", "raycon.pretrain", *OPTIONS]
SIDES = {
    "ray": PROGRAM,
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"),
        *(*PROGRAM, "--runtime=local"),
    ],
    "one process": [*PROGRAM, "--runtime=local", "--scaling.threads=2"],
    "ray, one rank": [*PROGRAM, "--scaling.workers=1"],
    "one rank": [*PROGRAM, "--runtime=local", "--scaling.threads=1"],
}
SETTLED = 30
"""Steps that are not counted."""
LOOK_S, WEIGH_S = 0.2, 5.0
"""How often steps and CPU seconds, and memory, are looked at: the second costs some milliseconds of CPU a process."""


class Measured:
    """One run of one side."""

    def __init__(self, side: str, folder: Path) -> None:
        self.folder = folder
        self.peak_mb = 0.0
        self._seen: list[tuple[int, float]] = []
        started = time.time()
        command = [*SIDES[side], f"--run.dir={folder}"]
        env = os.environ | {"OMP_NUM_THREADS": "2" if side == "one process" else "1"}
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
            watch = threading.Thread(target=self._watch, args=(process,), daemon=True)
            watch.start()
            status = process.wait()
            watch.join()
        if status:
            raise RuntimeError(f"{' '.join(command)} ended with {status}")
        train = self.lines("train")
        self.steps = [r["time/step"] for r in train if r["step"] > SETTLED]
        self.step = statistics.median(self.steps)
        self.losses = [r["loss"] for r in train]
        self.start = train[0]["time"] - train[0]["step"] * train[0]["time/step"] - started
        step, seconds = np.array([s for s in self._seen if s[0] > SETTLED]).T
        self.cpu = float(np.polyfit(step, seconds, 1)[0])
        sys.stderr.write(
            f"{side}: step {self.step * 1e3:.1f} ms wall, {self.cpu * 1e3:.1f} ms of CPU; first step after "
            f"{self.start:.1f} s; {self.peak_mb:.0f} MB\n"
        )

    def lines(self, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [r for r in read_lines(file) if r["kind"] == kind] if file.exists() else []

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        import psutil

        weigh = time.monotonic() + WEIGH_S
        while process.poll() is None:
            try:
                if time.monotonic() > weigh:
                    root = psutil.Process(process.pid)
                    total = sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])
                    self.peak_mb, weigh = max(self.peak_mb, total / 1e6), time.monotonic() + WEIGH_S
                if (train := self.lines("train")) and (not self._seen or train[-1]["step"] > self._seen[-1][0]):
                    ranks = [psutil.Process(pid).cpu_times() for pid in self.lines("start")[-1]["pids"]]
                    self._seen.append((train[-1]["step"], sum(t.user + t.system for t in ranks)))
            except psutil.Error:
                pass  # one of them has just ended
            time.sleep(LOOK_S)


def measure(quick: bool) -> list[harness.Row]:
    repeats = 2 if quick else 5
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            for side in SIDES:
                if quick and turn and side not in ("ray", "torchrun"):
                    continue
                runs[side].append(Measured(side, Path(folder) / f"{side}-{turn}"))
    if len({json.dumps(r.losses) for side in ("ray", "torchrun") for r in runs[side]}) != 1:
        raise RuntimeError("the two runtimes did not give the same losses")

    def values(side: str, name: str) -> list[float]:
        return [getattr(r, name) for r in runs[side]]

    def compare(claim: str, name: str, limit: float, other: str = "torchrun", own: str = "ray") -> harness.Row:
        ours, theirs = values(own, name), values(other, name)
        medians = statistics.median(ours), statistics.median(theirs)
        row = harness.at_most(claim, *medians, limit) if limit else harness.shown(claim, *medians)
        return harness.paired(row, ours, theirs) if len(ours) == len(theirs) else row

    free = ("one rank", "ray, one rank")
    return [
        compare("step under Ray Train / torchrun, wall s", "step", 1.03),
        compare("step under Ray Train / torchrun, CPU s of both ranks", "cpu", 1.03),
        compare("step of one rank under Ray Train / in one process, a core left free, wall s", "step", 1.03, *free),
        compare("step of one rank under Ray Train / in one process, a core left free, CPU s", "cpu", 1.03, *free),
        compare("step under Ray Train (2 ranks) / one process (2 threads), wall s", "step", 0, "one process"),
        compare("seconds to the first step, Ray / torchrun", "start", 0),
        compare("seconds to the first step, Ray / one process", "start", 0, "one process"),
        compare("peak memory of all processes (MB), Ray / torchrun", "peak_mb", 0),
    ]


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
