"""`ray job submit` on a cluster that was started by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.machines import Head
from raycon.core.log import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def head() -> Iterator[Head]:
    with Head() as found:
        yield found


def test_a_submitted_job_is_the_same_run(head: Head, tmp_path: Path) -> None:
    env = head.environment
    options = [
        "quickstart", "--train.epochs=2", "--train.warmup-epochs=1", "--method.warmup-epochs=1", "--method.clusters", "60", "100",
        "--data.loader=torch", "--mining.redo=1", "--mining.iterations=3", "--log.every-steps=1",
        "--evals.linear-epochs=2",
    ]  # fmt: skip
    submit = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", str(ROOT), "--"]
    job = [*submit, "python", "-m", "raycon.pretrain", *options, f"--run.dir={tmp_path}/job"]
    for _ in range(60):  # the node's job agent comes up a little after the dashboard
        done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=500, check=False)
        if "No available agent" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert "knn/top1_k1" in done.stdout
    bad = subprocess.run([*job, "--train.batch=63"], env=env, capture_output=True, text=True, timeout=400, check=False)
    assert bad.returncode != 0
    assert "train.batch = 63" in bad.stdout + bad.stderr
    local = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    local += [sys.executable, "-m", "raycon.pretrain", *options, "--runtime=local", f"--run.dir={tmp_path}/local"]
    subprocess.run(local, env=env, capture_output=True, timeout=400, check=True)

    def losses(name: str) -> list[float]:
        return [r["loss"] for r in read_lines(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"]

    assert len(losses("job")) == 22
    assert losses("job") == losses("local")
