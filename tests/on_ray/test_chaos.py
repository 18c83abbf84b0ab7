"""Faults on a cluster of several nodes: each run ends with the bits of one that nothing happened to.

A cluster of three nodes on this machine (the head runs no training), runs as processes of their own that join it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from raycon.core.log import read_lines
from tests.helpers import free_port

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos]
STEPS = 55
OPTIONS = [
    "quickstart", "--train.epochs=5", "--method.warmup-epochs=2", "--train.warmup-epochs=1", "--method.clusters", "60", "100",
    "--data.loader=torch", "--mining.redo=1", "--mining.iterations=4", "--log.every-steps=1",
    "--checkpoint.every-steps=5", "--checkpoint.keep=0", "--evals.names", "knn", "--evals.every-epochs=2",
    "--log.report=light", "--log.quiet",
]  # fmt: skip


class Machines:
    """A cluster whose nodes come and go. Nodes are started in the main thread alone: Ray wants that."""

    def __init__(self) -> None:
        port = free_port()
        # Named to the nodes' processes: where several clusters run on a machine, Ray would not find its own.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "dashboard_port": port, "include_dashboard": True}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        for _ in range(2):
            self.add()
        ray.init(address=self.cluster.address, namespace="raycon", log_to_driver=False, logging_level="ERROR")

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))

    def lose(self, node: Any) -> None:
        """As when its machine is switched off."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def to_two(self) -> None:
        while len(self.nodes) < 2:
            self.add()

    def drain(self, node: Any, seconds: float) -> None:
        """The notice that a spot node will be taken away."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "spot", deadline)
        assert accepted, why

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()
        del os.environ["RAY_API_SERVER_ADDRESS"]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    found = Machines()
    yield found
    found.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks without Ray: the same bits, as another test shows, for half the time."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prefix = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    run = [*prefix, sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--run.dir={folder}", "--runtime=local"]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(folder)) == STEPS
    return folder


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

    def __init__(self, machines: Machines, folder: Path, *more: str) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--run.dir={folder}", *more]
        self.environment = environment() | {"RAY_ADDRESS": machines.cluster.address}
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

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 300, every: float = 0.1) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"{what}: ended with {self.process.returncode}\n{self.log.read_text()}"
            assert time.monotonic() < end, (
                f"{what}: not within {seconds} s\n{self.log.read_text()}\n{events(self.folder)}"
            )
            threading.Event().wait(every)

    def ended(self, seconds: float = 400) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text() + events(self.folder)

    def ranks(self) -> list[int]:
        return list(records(self.folder, "start")[-1]["pids"])


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
    machines.to_two()
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
    machines.to_two()
    folder = tmp_path / "lost"
    with Job(machines, folder) as job:
        job.until(lambda: step_of(folder) >= 25, "the third epoch")
        machines.lose(machines.nodes[0])
        machines.add()
        job.ended()
    assert len(records(folder, "start")) == 2
    same(folder, undisturbed)


@pytest.mark.long
def test_a_node_that_is_taken_away_with_notice(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """A checkpoint within the notice; the loss is not counted: no failure is allowed here."""
    machines.to_two()
    folder = tmp_path / "spot"
    with Job(machines, folder, "--scaling.max-failures=0", "--checkpoint.every-steps=0") as job:
        job.until(lambda: step_of(folder) >= 13, "the second epoch")
        node = machines.nodes[0]
        machines.drain(node, 8.0)
        job.until(lambda: "a node is being taken away: saved" in events(folder), "the checkpoint", every=0.02)
        machines.add()
        machines.lose(node)
        job.ended()
    starts = records(folder, "start")
    assert len(starts) == 2
    assert starts[1]["step"] % 11 != 0  # gone on from the checkpoint of the notice, not of an epoch's end
    same(folder, undisturbed)


@pytest.mark.long
def test_a_rank_that_hangs_is_named_and_left_behind(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    machines.to_two()
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
    """On the same cluster: what the first held there is freed. Meanwhile the directory is held against a second."""
    machines.to_two()
    folder = tmp_path / "again"
    with Job(machines, folder) as job:
        job.until(lambda: step_of(folder) >= 25, "the third epoch")
        second = subprocess.run(
            job.command, env=job.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 2, second.stderr
        assert f"being trained in by process {job.process.pid} " in second.stderr
        os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait(30)
    with Job(machines, folder) as job:
        job.ended()
    assert records(folder, "start")[-1]["step"] >= 25
    same(folder, undisturbed)


@pytest.mark.long
def test_a_run_shrinks_and_grows(machines: Machines, undisturbed: Path, tmp_path: Path) -> None:
    """2 workers, a node is lost: 1, a node comes: 2. Every step once, the same global batches, a loss close by."""
    machines.to_two()
    folder = tmp_path / "elastic"
    with Job(machines, folder, "--scaling.min-workers=1", "--scaling.resize-s=5", "--train.epochs=5") as job:
        job.until(lambda: step_of(folder) >= 13, "the second epoch")
        machines.lose(machines.nodes[0])
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
