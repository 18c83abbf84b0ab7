"""`ray job submit` on a cluster that was started by hand."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycon.core.log import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node of its own ports, ended with this test alone (never `ray stop`: it would end every cluster)."""
    gcs, dashboard, client = free_port(), free_port(), free_port()
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("RAY_ADDRESS", None)
    short = tempfile.mkdtemp(prefix="ray-")  # socket paths have a length limit that tmp_path exceeds
    start = [
        f"{bin_folder}/ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=2", "--object-store-memory=200000000",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--temp-dir={short}",
    ]  # fmt: skip
    with subprocess.Popen(start, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{dashboard}"
        try:
            end = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < end, "the dashboard did not come up"
                    assert process.poll() is None
                    threading.Event().wait(0.2)
            yield address, env
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_a_submitted_job_is_the_same_run(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, env = head
    options = [
        "quickstart", "--train.epochs=2", "--train.warmup-epochs=1", "--method.warmup-epochs=1", "--method.clusters", "60", "100",
        "--data.loader=torch", "--mining.redo=1", "--mining.iterations=3", "--log.every-steps=1",
        "--evals.linear-epochs=2",
    ]  # fmt: skip
    submit = ["ray", "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
    job = [*submit, "python", "-m", "raycon.pretrain", *options, f"--run.dir={tmp_path}/job"]
    for _ in range(10):  # the node's job agent comes up a little after the dashboard
        done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=300, check=False)
        if "No available agent" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert "knn/top1_k1" in done.stdout
    bad = subprocess.run([*job, "--train.batch=63"], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert bad.returncode != 0
    assert "train.batch = 63" in bad.stdout + bad.stderr
    local = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    local += [sys.executable, "-m", "raycon.pretrain", *options, "--runtime=local", f"--run.dir={tmp_path}/local"]
    subprocess.run(local, env=env, capture_output=True, timeout=200, check=True)

    def losses(name: str) -> list[float]:
        return [r["loss"] for r in read_lines(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]

    assert len(losses("job")) == 22
    assert losses("job") == losses("local")
