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


MINING = """
import dataclasses
from raycon import methods
from raycon.recipes import recipe
from raycon.tuning import Study, choice, uniform

def mine():
    base = recipe("quickstart")
    base = dataclasses.replace(
        base,
        method=methods.configure("pcl", dim=16, queue=256, clusters=(8, 16), negatives=4, warmup_epochs=1, momentum=0.99),
        model=dataclasses.replace(base.model, width=4),
        data=dataclasses.replace(base.data, loader="torch"),
        train=dataclasses.replace(base.train, epochs=4, warmup_epochs=0.0),
        mining=dataclasses.replace(base.mining, shards=1, iterations=5),
        checkpoint=dataclasses.replace(base.checkpoint, every_epochs=1, keep=0),
        evals=dataclasses.replace(base.evals, knn_k=(20,)),
        scaling=dataclasses.replace(base.scaling, workers=1),
        log=dataclasses.replace(base.log, every_steps=1),
    )
    space = {"method.temperature": choice(0.2, 0.3)}
    return Study(base=base, space=space, searcher="grid", scheduler="none", trials=2, validation=0.2)

def in_flight():
    return dataclasses.replace(mine(), space={"method.temperature": uniform(0.1, 0.5)}, searcher="random", scheduler="pbt")
"""


@pytest.mark.chaos
@pytest.mark.long
def test_trials_with_indexes_of_their_own_go_on_after_the_death_of_their_leader(tmp_path: Path) -> None:
    """Two trials of PCL at once; the process that leads one of them is killed: it goes on, the other is not touched."""
    import psutil

    folder, study = tmp_path / "sweep", tmp_path / "study.py"
    study.write_text(MINING)
    indexes, leader = 0, 0
    with subprocess.Popen(command(f"{study}:mine", "--dir", str(folder)), env=environment(), text=True) as process:

        def both_mine() -> bool:
            """Both have a clustering, and one more process per trial is there to lead it."""
            nonlocal indexes, leader
            mined = [any("mining" in r for r in read_lines(f)) for f in folder.glob("trials/*/metrics.jsonl")]
            if sum(mined) < 2:
                return False
            titles = {}
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    titles[child.pid] = " ".join(child.cmdline())
            indexes = sum("IndexShard" in title for title in titles.values())
            leaders = [pid for pid, title in titles.items() if "RayconTrial" in title]
            leader = min(leaders, default=0)
            return len(leaders) == 2

        wait_for(both_mine, process)
        os.kill(leader, signal.SIGKILL)
        assert process.wait(timeout=900) == 0
    assert indexes == 2
    trials = read_trials(folder, open_plan(folder).study)
    assert [t.state for t in trials.values()] == ["finished", "finished"]
    assert sorted(t.retries for t in trials.values()) == [0, 1]
    assert len({t.folder for t in trials.values()}) == 2
    for trial in trials.values():
        last = max(steps_of(folder / trial.folder))
        assert steps_of(folder / trial.folder) == list(range(1, last + 1))


@pytest.mark.long
def test_pbt_goes_on_from_the_better_trials_checkpoint(tmp_path: Path) -> None:
    """Networks, optimiser, queue and snapshot of the exchange are the giver's, bit for bit, and training goes on there."""
    folder, study = tmp_path / "sweep", tmp_path / "study.py"
    study.write_text(MINING)
    ask = command(f"{study}:in_flight", "--dir", str(folder))
    done = subprocess.run(ask, capture_output=True, text=True, env=environment(), timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = read_trials(folder, open_plan(folder).study)
    assert {t.state for t in trials.values()} == {"finished"}, done.stderr
    exchanges = [e for e in events(folder, "start") if e.get("from_other")]
    assert exchanges
    for exchange in exchanges:
        taken = folder / exchange["folder"]
        origin = json.loads((taken / "origin.json").read_text())
        assert origin["run"].partition(".")[0] != taken.name.partition(".")[0]
        copy, source = (run / "checkpoints" / origin["checkpoint"] for run in (taken, taken.parent / origin["run"]))
        files = {f.name for f in source.iterdir()}
        assert files >= {"model.safetensors", "optimizer.safetensors", "state.json"}
        assert ("snapshot.safetensors" in files) == (exchange["epoch"] > 1)  # none during the warm-up
        assert {f.name: f.read_bytes() for f in copy.iterdir()} == {f.name: f.read_bytes() for f in source.iterdir()}
        # The next run directory of this trial, or this one to its end, trains from that step on, with the new options.
        steps = steps_of(taken)
        assert steps == list(range(origin["entry"]["step"] + 1, max(steps) + 1))
        value = exchange["options"]["method.temperature"]
        assert 0.1 <= value <= 0.5
        assert f"temperature: {value}" in (taken / "config.yaml").read_text()


def test_a_sweep_that_cannot_place_one_trial_says_so(tmp_path: Path) -> None:
    ask = command(*TINY, "--scaling.workers=64", "--dir", str(tmp_path / "s"))
    done = subprocess.run(ask, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "not even one trial can be placed: a trial needs 64 CPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()
