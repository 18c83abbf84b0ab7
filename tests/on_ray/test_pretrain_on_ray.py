"""The main job on real Ray processes: the same losses as without Ray, and the same weights after kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from raycon.core.log import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIONS = [
    "quickstart",
    "--train.epochs=6",
    "--method.warmup-epochs=2",
    "--method.clusters", "60", "100",
    "--data.loader=torch",
    "--mining.redo=1",
    "--mining.iterations=4",
    "--log.every-steps=1",
    "--checkpoint.every-steps=5",
    "--checkpoint.keep=0",
    "--evals.every-epochs=3",
    "--evals.linear-epochs=5",
]  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "raycon.pretrain", *OPTIONS, "--run.dir", str(folder), *more]


def environment() -> dict[str, str]:
    return os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def finished(folder: Path, *more: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*prefix, *command(folder, *more)], capture_output=True, text=True, env=environment(), timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_lines(folder / "metrics.jsonl") if r["kind"] == kind]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(folder, "train")]


def same_weights(a: Path, b: Path) -> bool:
    name = "checkpoints/last/model.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes() and bool(load_file(a / name))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < end, "timed out"
        threading.Event().wait(0.2)  # between two looks: spinning would take a core from the run


def ranks_of(run_dir: Path) -> list[int]:
    """Process ids of this run's Ray Train workers."""
    found = []
    for record in records(run_dir, "start"):
        found = record["pids"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    out = finished(folder)
    assert "knn/top1_k1" in out
    assert "linear/top1" in out
    assert str(folder) in out
    return folder


def test_the_run_directory_is_complete(undisturbed: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "evaluations.json", "report.html", "log.txt", "pictures/views.png"):
        assert (undisturbed / name).stat().st_size > 0, name
    steps = [r["step"] for r in records(undisturbed, "train")]
    assert steps == list(range(1, 6 * 11 + 1))
    assert [r["version"] for r in records(undisturbed, "snapshot")] == [2, 3, 4, 5]
    entries = json.loads((undisturbed / "evaluations.json").read_text())
    assert [e["step"] for e in entries] == [33, 66]
    assert all(not e["failed"] for e in entries)
    assert (undisturbed / "checkpoints" / "last").resolve().name == "00000066"


def test_two_torchrun_ranks_give_the_same_losses(undisturbed: Path, tmp_path: Path) -> None:
    prefix = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python")
    finished(tmp_path / "run", "--runtime=local", prefix=prefix)
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert same_weights(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("loader", [pytest.param("ffcv", marks=pytest.mark.ffcv), "ray"])
def test_every_loader_gives_the_same_losses(undisturbed: Path, tmp_path: Path, loader: str) -> None:
    finished(tmp_path / "run", f"--data.loader={loader}")
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_killed_worker_costs_nothing_but_time(undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 of one rank in the middle of an epoch with prototypes: the run recovers by itself, bit for bit."""
    folder = tmp_path / "run"
    with subprocess.Popen(command(folder), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(s >= 29 for s, _ in losses(folder)), process)
        os.kill(ranks_of(folder)[1], signal.SIGKILL)
        process.communicate(timeout=900)
    assert process.returncode == 0
    assert len(records(folder, "start")) == 2
    assert same_weights(folder, undisturbed)
    assert losses(folder) == losses(undisturbed)


@pytest.mark.chaos
def test_a_killed_job_is_resumed(undisturbed: Path, tmp_path: Path) -> None:
    """The driver and everything it started are killed; --resume ends with the same bits, though checkpoints that it reported
    to Ray are gone, and with all evaluations, also of one that had not been evaluated when it was killed."""
    folder = tmp_path / "run"
    ask = command(folder, "--checkpoint.keep=1")
    with subprocess.Popen(ask, env=environment(), start_new_session=True, text=True) as process:
        wait_for(lambda: any(s >= 40 for s, _ in losses(folder)), process)
        ranks = ranks_of(folder)
        os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks:  # workers are in groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
    resume = [sys.executable, "-m", "raycon.pretrain", "--resume", str(folder)]
    done = subprocess.run(resume, capture_output=True, text=True, env=environment(), timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(folder, undisturbed)
    assert losses(folder) == losses(undisturbed)
    evaluated = [[e["step"] for e in json.loads((f / "evaluations.json").read_text())] for f in (folder, undisturbed)]
    assert evaluated[0] == evaluated[1]


def test_a_signal_ends_with_a_checkpoint(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen(command(folder), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(s >= 12 for s, _ in losses(folder)), process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert f"--resume {folder}" in out
    last = max(s for s, _ in losses(folder))
    assert last < 66
    state = json.loads((folder / "checkpoints/last/state.json").read_text())
    assert state["step"] == last
    assert losses(folder) == losses(undisturbed)[:last]


def test_more_workers_than_the_machine_has(tmp_path: Path) -> None:
    run = command(tmp_path / "run", "--scaling.workers=64", "--train.batch=128")
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    assert done.returncode == 2
    assert "scaling.workers = 64 x 1 CPU" in done.stderr
    assert "free" in done.stderr
    assert "Traceback" not in done.stderr
