"""Faults on a cluster of several nodes: each run ends with the bits of one that nothing happened to.

A cluster of three nodes on this machine (the head runs no training), runs as processes of their own that join it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.machines import Machines
from tests.on_ray.chaos import STEPS, Job, events, losses, records, same, step_of

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with Machines() as found:
        yield found


def ours(title: str) -> list[psutil.Process]:
    """Processes of this cluster alone whose title begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def kill_actor(folder: Path, name: str) -> None:
    """One of the index; Ray starts it again."""
    ray.kill(ray.get_actor(f"{folder.name}/index/{name}", f"raycon:{folder}"), no_restart=False)


class Hunter(threading.Thread):
    """Kills the first process of a title that the cluster starts."""

    def __init__(self, title: str) -> None:
        super().__init__(daemon=True)
        self.title, self.killed, self.ended = title, 0, threading.Event()

    def run(self) -> None:
        while not self.killed and not self.ended.wait(0.2):
            for process in ours(self.title):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    self.killed += 1


def test_shards_a_writer_and_an_evaluation_are_killed(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """In one run: index shards in a refresh and in training, rank 0 as it writes, an evaluation whenever it comes."""
    machines.grow_to(2)
    folder = tmp_path / "many"
    hunter = Hunter("ray::evaluate")
    hunter.start()
    with Job(machines, folder) as job:
        job.until(lambda: any("mining" in r for r in records(folder, "state")), "the first refresh", every=0.02)
        kill_actor(folder, "0")  # its rows are being added, or clustered
        job.until(lambda: step_of(folder) >= 24, "the third epoch")
        kill_actor(folder, "1")
        kill_actor(folder, "coordinator")
        writer = job.ranks()[0]
        job.until(lambda: any(folder.glob("checkpoints/.*.part")), "a checkpoint being written", every=0.001)
        os.kill(writer, signal.SIGKILL)
        job.ended()
    hunter.ended.set()
    assert hunter.killed
    assert len(records(folder, "start")) == 2
    entries = json.loads((folder / "evaluations.json").read_text())
    assert [e["step"] for e in entries] == [22, 44, 55]
    assert not any(e["failed"] for e in entries)
    same(folder, undisturbed)


def test_a_lost_node_is_replaced(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """With the worker and whatever of the index was on it."""
    machines.grow_to(2)
    folder = tmp_path / "lost"
    with Job(machines, folder) as job:
        job.until(lambda: step_of(folder) >= 25, "the third epoch")
        machines.lose(machines.spare())
        machines.add()
        job.ended()
    assert len(records(folder, "start")) == 2
    same(folder, undisturbed)


@pytest.mark.long
def test_a_node_that_is_taken_away_with_notice(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """A checkpoint within the notice; the loss is not counted: no failure is allowed here."""
    machines.grow_to(2)
    folder = tmp_path / "spot"
    with Job(machines, folder, "--scaling.max-failures=0", "--checkpoint.every-steps=0") as job:
        job.until(lambda: step_of(folder) >= 13, "the second epoch")
        node = machines.spare()
        machines.drain(node, 8.0)
        job.until(lambda: "a node is being taken away: saved" in events(folder), "the checkpoint", every=0.02)
        machines.lose(node)
        machines.add()
        job.ended()
    starts = records(folder, "start")
    assert len(starts) == 2
    saved = min(r["step"] for r in records(folder, "event") if "saved" in r["text"])
    assert (folder / "checkpoints" / f"{saved:08d}").is_dir()
    assert saved <= starts[1]["step"]  # gone on from there, or from a later one when it went on for so long
    same(folder, undisturbed)


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_left_behind(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    machines.grow_to(2)
    folder = tmp_path / "hang"
    with Job(machines, folder, "--scaling.timeout-s=30", "--scaling.max-failures=-1") as job:
        job.until(lambda: step_of(folder) >= 13, "the second epoch")
        os.kill(job.ranks()[1], signal.SIGSTOP)
        job.ended()
    assert "did not hear from rank 1" in events(folder)
    same(folder, undisturbed)


@pytest.mark.long
def test_the_driver_is_killed_and_the_command_given_again(
    machines: Machines, undisturbed: Path, tmp_path: Path
) -> None:
    """On the same cluster: what the first held there is freed. Meanwhile the directory is held against a second.

    Checkpoints that the first reported to Ray are gone by then.
    """
    machines.grow_to(2)
    folder = tmp_path / "again"
    with Job(machines, folder, "--checkpoint.keep=1") as job:
        job.until(lambda: step_of(folder) >= 25, "the third epoch")
        second = subprocess.run(
            job.command, env=job.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 2, second.stderr
        assert f"being trained in by process {job.process.pid} " in second.stderr
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait(30)
    with Job(machines, folder, "--checkpoint.keep=1") as job:
        job.ended()
    assert records(folder, "start")[-1]["step"] >= 25
    same(folder, undisturbed)


@pytest.mark.long
def test_a_run_shrinks_and_grows(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """2 workers, a node is lost: 1, a node comes: 2. Every step once, the same global batches, a loss close by."""
    machines.grow_to(2)
    folder = tmp_path / "elastic"
    with Job(machines, folder, "--scaling.min-workers=1", "--scaling.resize-s=5", "--train.epochs=5") as job:
        job.until(lambda: step_of(folder) >= 13, "the second epoch")
        machines.lose(machines.spare())
        job.until(lambda: [r["world"] for r in records(folder, "start")][-1] == 1, "one worker")
        machines.add()
        job.ended()
    worlds = [r["world"] for r in records(folder, "start")]
    assert worlds[:2] == [2, 1]
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    before = min(r["step"] for r in records(folder, "start") if r["world"] == 1)
    assert losses(folder)[:before] == losses(undisturbed)[:before]
    ratios = [a / b for (_, a), (_, b) in zip(losses(folder), losses(undisturbed), strict=True)]
    assert all(0.8 < ratio < 1.25 for ratio in ratios)
