"""Sweeps on real Ray processes: to the end, through a crash, from kill -9 of the driver on, and as plain Ray Tune."""

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

from raycon.core.log import read_lines
from raycon.tuning.record import open_plan, read_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = [
    "digits-temperature",
    "--train.epochs=2",
    "--train.warmup-epochs=0",
    "--model.width=4",
    "--data.loader=torch",
    "--log.every-steps=1",
]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "raycon.tuning.sweep", *more]


def environment() -> dict[str, str]:
    return os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "trials.jsonl") if line["event"] == kind]


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if line["kind"] == "train"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < end, "timed out"
        threading.Event().wait(0.2)  # between two looks: spinning would take a core from the trials


@pytest.mark.chaos
def test_a_sweep_survives_a_crash_and_the_death_of_its_driver(tmp_path: Path) -> None:
    """One trial crashes for good (NaN), the driver is killed after the first end; resumed, nothing is done twice."""
    folder = tmp_path / "sweep"
    study = tmp_path / "mine.py"
    study.write_text(
        "import dataclasses\n"
        "from raycon.tuning import choice\n"
        "from raycon.tuning.study import find\n"
        "def mine():\n"
        "    base = find('digits-temperature')()\n"
        "    space = {'train.lr': choice(0.05, 1e30, 0.1)}\n"  # with one of them the loss is soon no number
        "    return dataclasses.replace(base, space=space, searcher='grid', scheduler='asha', reduction=2)\n"
    )
    ask = command(f"{study}:mine", *TINY[1:], "--dir", str(folder), "--max-concurrent", "1")
    with subprocess.Popen(ask, env=environment(), start_new_session=True, text=True) as process:
        # The first trial has ended, the second one is on its way.
        wait_for(lambda: bool(events(folder, "end")) and len(events(folder, "start")) == 2, process)
        pids = [p for f in folder.glob("trials/*/metrics.jsonl") for r in read_lines(f) for p in r.get("pids", [])]
        os.killpg(process.pid, signal.SIGKILL)
        for pid in pids:  # workers are in groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    before = {p: p.read_bytes() for p in (folder / "trials").glob("0000-*/metrics.jsonl")}
    assert len(before) == 1
    done = subprocess.run(
        command("--resume", str(folder)), capture_output=True, text=True, env=environment(), timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plan = open_plan(folder)
    trials = read_trials(folder, plan.study)
    (failed,) = [t for t in trials.values() if t.options["train.lr"] == 1e30]
    others = [t for t in trials.values() if t is not failed]
    assert (failed.state, failed.retries) == ("failed", 1)
    assert "not finite in step" in failed.error
    assert {t.state for t in others} <= {"finished", "stopped"}
    assert trials[0].state == "finished"
    # Nothing was repeated: the finished trial was not touched, every step of the others is there once.
    assert {p: p.read_bytes() for p in before} == before
    assert [e["trial"] for e in events(folder, "start")].count(0) == 1
    for trial in others:
        steps = steps_of(folder / trial.folder)
        assert steps == list(range(1, len(steps) + 1))
    assert len({t.folder for t in trials.values()}) == 3
    assert (folder / "best.yaml").exists()
    assert "train.lr" in (folder / "report.html").read_text(encoding="utf-8")
    assert not (folder / ".tune").exists()
    assert "1 failed" in done.stdout


def test_a_signal_ends_a_sweep_that_can_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    ask = command(*TINY, "--train.epochs=60", "--trials=2", "--max-concurrent=1", "--dir", str(folder))
    with subprocess.Popen(ask, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(steps_of(f.parent) for f in folder.glob("trials/*/metrics.jsonl")), process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    assert f"--resume {folder}" in out
    (run_dir,) = (folder / "trials").glob("0*")
    last = json.loads((run_dir / "checkpoints/last/state.json").read_text())["step"]
    assert 0 < last == max(steps_of(run_dir)) < 60 * 8
    trials = read_trials(folder, open_plan(folder).study)
    assert [t.state for t in trials.values()] == ["waiting", "waiting"]
    assert [bool(t.options) for t in trials.values()] == [True, False]
    assert "2 trials: 2 waiting" in out


def test_plain_ray_tune_takes_a_recipe(tmp_path: Path) -> None:
    """A user's own Tuner: a directory of its own, results by name."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import dataclasses, sys\n"
        "from ray import tune\n"
        "from raycon.on_ray.trainer import connect\n"
        "from raycon.tuning import max_concurrent, trainable\n"
        "from raycon.tuning.study import find\n"
        "base = find('digits-temperature')().base\n"
        "base = dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=1, warmup_epochs=0.0),\n"
        "    model=dataclasses.replace(base.model, width=4), data=dataclasses.replace(base.data, loader='torch'))\n"
        "connect()\n"
        "at_once = max_concurrent(base)\n"
        "tuner = tune.Tuner(trainable(base, folder=sys.argv[1] + '/runs'),\n"
        "    param_space={'method.temperature': tune.grid_search([0.3])},\n"
        "    tune_config=tune.TuneConfig(metric='score', mode='max', max_concurrent_trials=at_once),\n"
        "    run_config=tune.RunConfig(storage_path=sys.argv[1] + '/tune', verbose=0))\n"
        "results = tuner.fit()\n"
        "assert not results.errors, results.errors\n"
        "for r in results:\n"
        "    assert r.metrics['score'] == r.metrics['knn/top1_k20'] > 10, r.metrics\n"
        "    assert r.metrics['epoch'] == 1\n"
        "print('directories', *sorted({r.metrics['run_dir'] for r in results}))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("directories")]
    (folder,) = map(Path, line.split()[1:])
    assert folder.parent == tmp_path / "runs"
    assert json.loads((folder / "checkpoints/last/state.json").read_text())["step"] == 10
    assert "temperature: 0.3" in (folder / "config.yaml").read_text()


def test_a_sweep_that_cannot_place_one_trial_says_so(tmp_path: Path) -> None:
    ask = command(*TINY, "--scaling.workers=64", "--dir", str(tmp_path / "s"))
    done = subprocess.run(ask, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "not even one trial can be placed: a trial needs 64 CPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
