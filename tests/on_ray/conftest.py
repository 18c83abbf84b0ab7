"""What nothing happened to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.on_ray.chaos import OPTIONS, STEPS, environment, losses


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks without Ray: the same bits, as another test shows, for half the time."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prefix = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    run = [*prefix, sys.executable, "-m", "raycon.pretrain", *OPTIONS, f"--run.dir={folder}", "--runtime=local"]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(folder)) == STEPS
    return folder
