"""The head of a cluster is switched off under a run, and on again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.machines import Head
from tests.on_ray.chaos import Job, events, records, same, step_of

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.long]


def test_the_head_is_lost_and_the_command_given_again(undisturbed: Path, tmp_path: Path) -> None:
    """A driver that is not on it ends by itself and says so; the same command on the new head goes on."""
    folder = tmp_path / "run"
    with Head() as head:
        with Job(head, folder) as job:
            job.until(lambda: step_of(folder) >= 25, "the third epoch")
            head.kill()
            assert job.process.wait(300) != 0
        assert "is gone: this run ends; go on with --resume" in events(folder)
        reached = step_of(folder)
        head.start()
        with Job(head, folder) as job:
            job.ended()
    starts = records(folder, "start")
    assert len(starts) == 2
    assert 20 <= starts[1]["step"] <= reached
    same(folder, undisturbed)
