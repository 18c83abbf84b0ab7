"""A run on nodes that share no file system, kept at an address: its workers, evaluations and driver meet only there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raycon.core import address
from raycon.core.log import read_lines
from raycon.training import checkpoint
from raycon.training.storage import Store

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.long]
OPTIONS = [
    "quickstart", "--train.epochs=3", "--method.warmup-epochs=1", "--train.warmup-epochs=0", "--method.clusters", "20",
    "--method.negatives=10", "--data.loader=torch", "--mining.redo=1", "--mining.iterations=2", "--log.every-steps=1",
    "--checkpoint.every-steps=5", "--checkpoint.every-epochs=1", "--evals.names", "knn", "--evals.every-epochs=1",
    "--log.report=light", "--log.quiet", "--model.width=8",
]  # fmt: skip


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_the_nodes_meet_at_the_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is killed: the group goes on from the address, and all ends as on two ranks with one folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", address.WORK: str(tmp_path / "driver")}
    plain = tmp_path / "plain"
    prefix = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    command = [sys.executable, "-m", "raycon.pretrain", *OPTIONS]
    done = subprocess.run([*prefix, *command, f"--run.dir={plain}", "--runtime=local"], env=environment,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr

    place = f"file://{tmp_path}/store/run"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20,
                                                            "include_dashboard": False})  # fmt: skip
    log = tmp_path / "run.log"
    try:
        for name in ("a", "b"):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, env_vars={address.WORK: str(tmp_path / name)})
        with log.open("w") as out:
            process = subprocess.Popen([*command, f"--run.dir={place}", "--scaling.workers=2"], stdout=out, stderr=out,
                                       env=environment | {"RAY_ADDRESS": cluster.address}, start_new_session=True)  # fmt: skip
        monkeypatch.setenv(address.WORK, str(tmp_path / "driver"))
        metrics = address.working_folder(place) / "metrics.jsonl"
        end = time.monotonic() + 500
        while not any(r["kind"] == "checkpoint" and r["step"] >= 10 for r in read_lines(metrics)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            threading.Event().wait(0.1)
        victim = [r["pids"] for r in read_lines(metrics) if r["kind"] == "start"][-1][1]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(600) == 0, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError, UnboundLocalError):
            os.killpg(process.pid, signal.SIGKILL)
        cluster.shutdown()
    store = Store(place)
    assert losses(address.working_folder(place)) == losses(plain)
    folder = tmp_path / "fetched"
    path, refused = store.fetch_newest(folder)
    assert path is not None
    assert refused == []
    assert (path / checkpoint.MODEL).read_bytes() == (plain / "checkpoints" / "last" / checkpoint.MODEL).read_bytes()
    starts = [r for r in read_lines(address.working_folder(place) / "metrics.jsonl") if r["kind"] == "start"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 10
    ours = json.loads(store.get("evaluations.json") or b"")
    theirs = json.loads((plain / "evaluations.json").read_text())
    assert [(e["step"], e["results"]) for e in ours] == [(e["step"], e["results"]) for e in theirs]
    # Each machine has a folder of its own, and nothing of the run but the checkpoints of rank 0 stays on one.
    assert {p.name for p in tmp_path.iterdir()} >= {"a", "b", "driver", "store"}
    assert not [file for name in ("a", "b") for file in (tmp_path / name).rglob("metrics.jsonl")]
    assert [file for name in ("a", "b") for file in (tmp_path / name).rglob(checkpoint.MODEL)]
