"""Soak: random faults over one run, which must end as if nothing had happened: python -m benchmarks.soak

python -m benchmarks.soak [--quick] [--faults N] [--seed S] [--minutes M] [--json FILE]

The faults and where they fall are drawn from the seed: the same seed, the same faults. 30 of them take about 15 minutes on
2 free cores; --quick does 4. The run must end with the losses, weights and evaluations of one that nothing happened to.
Exit status 1 when it does not. Seconds are from a fault to the next step that is written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.faults import KINDS, OPTIONS, Run, restarts
from benchmarks.harness import Row

EVALUATIONS = ["--evals.names", "knn", "--evals.every-epochs=2"]
PER_EPOCH = 11
"""Steps of an epoch of these runs."""


@dataclass
class Found:
    """What a soak has come to."""

    asked: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Per kind of fault: from each to the next step."""
    same: bool = False
    """Losses, weights and evaluations are those of the undisturbed run."""
    minutes: float = 0.0
    undisturbed_minutes: float = 0.0

    @property
    def survived(self) -> int:
        return sum(map(len, self.seconds.values()))

    def rows(self) -> list[Row]:
        rows = [
            harness.at_least("faults survived, of those planned", self.survived, self.asked, 1.0),
            harness.at_least("losses, weights, evaluations as undisturbed, to the bit (1: yes)", self.same, 1, 1.0),
            harness.shown("minutes, of the undisturbed run", self.minutes, self.undisturbed_minutes),
        ]
        for kind, seconds in sorted(self.seconds.items()):
            claim = f"{kind} killed, {len(seconds)} times: median and most s to the next step"
            rows.append(harness.shown(claim, statistics.median(seconds), max(seconds)))
        return rows


def plan(faults: int, seed: int) -> list[tuple[str, int]]:
    """So many faults: the kind of each, and how many steps after the one before it falls.

    All kinds come before one comes again, in an order that is drawn anew each time.
    """
    choose, found = random.Random(seed), list[tuple[str, int]]()
    while len(found) < faults:
        found += [(kind, choose.randint(3, 10)) for kind in choose.sample(KINDS, len(KINDS))]
    return found[:faults]


def length(faults: list[tuple[str, int]]) -> int:
    """Epochs that hold them all. Some wait for their occasion: a refresh, a checkpoint, an evaluation."""
    waits = {"writer": 5, "refreshing shard": PER_EPOCH, "evaluation": 2 * PER_EPOCH}
    steps = sum(steps + waits.get(kind, 0) + 2 for kind, steps in faults)
    return max(5, -(-steps // PER_EPOCH) + 3)


def soak(faults: int, seed: int, minutes: float, folder: Path) -> Found:
    """The faults of ``seed`` on a run in ``folder``; none more after ``minutes``."""
    planned, found = plan(faults, seed), Found(faults)
    epochs = length(planned)
    begin = time.monotonic()
    with Run(folder / "run", epochs, *EVALUATIONS) as run:
        for kind, steps in planned:
            if time.monotonic() - begin > 60 * minutes or not run.further(steps):
                break
            hit: list[bool] = []
            try:
                seconds = run.recovered(partial(_note, hit, run, kind), restarts(kind))
            except RuntimeError:
                break
            if not hit[0]:
                break
            found.seconds.setdefault(kind, []).append(seconds)
            sys.stderr.write(f"{found.survived} of {faults}: {kind}, {seconds:.1f} s, step {run.steps()[-1]}\n")
        status = run.process.wait(1800)
    found.minutes = (time.monotonic() - begin) / 60
    begin = time.monotonic()
    undisturbed(folder / "undisturbed", epochs)
    found.undisturbed_minutes = (time.monotonic() - begin) / 60
    found.same = status == 0 and identical(run.folder, folder / "undisturbed")
    return found


def _note(hit: list[bool], run: Run, kind: str) -> None:
    hit.append(run.kill(kind))


def undisturbed(folder: Path, epochs: int) -> None:
    """The same run on two ranks without Ray, which nothing happens to."""
    prefix = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    run = [*prefix, sys.executable, "-m", "raycon.pretrain", *OPTIONS, *EVALUATIONS, f"--train.epochs={epochs}"]
    run += [f"--run.dir={folder}", "--runtime=local"]
    subprocess.run(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=3600, check=True)


def identical(folder: Path, other: Path) -> bool:
    """Every step once with the same loss, the same weights, every evaluation with the same numbers."""
    losses, numbers, weights = (a == b for a, b in zip(_what_is_left(folder), _what_is_left(other), strict=True))
    if not (losses and numbers and weights):
        sys.stderr.write(f"the same as undisturbed: losses {losses}, evaluations {numbers}, weights {weights}\n")
    return losses and numbers and weights


def _what_is_left(folder: Path) -> tuple[Any, ...]:
    from raycon.core.log import read_lines

    losses: list[Any] = [(r["step"], r["loss"]) for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
    entries = json.loads((folder / "evaluations.json").read_text(encoding="utf-8"))
    numbers = [(e["step"], e["results"], e["failed"]) for e in entries]
    return losses, numbers, (folder / "checkpoints/last/model.safetensors").read_bytes()


def main(argv: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 faults: within 4 minutes on 2 cores")
    parser.add_argument("--faults", type=int, help="how many (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no more faults after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    asked = parser.parse_args(argv)
    faults = asked.faults if asked.faults is not None else 4 if asked.quick else 30
    with tempfile.TemporaryDirectory() as folder:
        found = soak(faults, asked.seed, asked.minutes, Path(folder))
    rows = found.rows()
    sys.stdout.write(harness.table(rows))
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if not all(row.holds for row in rows):
        sys.exit(1)
    return rows


if __name__ == "__main__":
    main()
