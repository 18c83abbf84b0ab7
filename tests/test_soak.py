"""The soak of random faults: its plan, what it compares, and a small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import faults, soak
from raycon.core.log import append_line


def test_the_same_seed_gives_the_same_faults() -> None:
    assert soak.plan(30, 7) == soak.plan(30, 7)
    assert soak.plan(30, 7)[:4] == soak.plan(4, 7)
    assert soak.plan(30, 7) != soak.plan(30, 8)
    assert sorted(kind for kind, _ in soak.plan(30, 0)) == sorted(3 * faults.KINDS)
    for seed in range(20):
        planned = soak.plan(30, seed)
        assert soak.length(planned) * soak.PER_EPOCH > sum(steps for _, steps in planned)


def write(folder: Path, losses: list[float], score: float, weights: bytes) -> Path:
    (folder / "checkpoints" / "last").mkdir(parents=True)
    for step, loss in enumerate(losses, 1):
        append_line(folder / "metrics.jsonl", {"kind": "train", "step": step, "loss": loss})
    entries = [{"step": 2, "results": {"knn/top1": score}, "failed": {}, "seconds": {}}]
    (folder / "evaluations.json").write_text(json.dumps(entries))
    (folder / "checkpoints" / "last" / "model.safetensors").write_bytes(weights)
    return folder


def test_whatever_differs_is_seen(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", [1.0, 0.5], 90.0, b"weights")
    assert soak.identical(write(tmp_path / "same", [1.0, 0.5], 90.0, b"weights"), whole)
    others = [([1.0], 90.0, b"weights"), ([1.0, 0.5, 0.5], 90.0, b"weights"), ([1.0, 0.4], 90.0, b"weights"),
              ([1.0, 0.5], 90.1, b"weights"), ([1.0, 0.5], 90.0, b"weighty")]  # fmt: skip
    for number, other in enumerate(others):
        assert not soak.identical(write(tmp_path / str(number), *other), whole), other


@pytest.mark.parametrize("gone", [False, True])
def test_what_was_not_survived_does_not_hold(gone: bool) -> None:
    found = soak.Found(3, {"job": [9.0, 11.0]} if gone else {"job": [9.0, 11.0], "shard": [0.5]}, True, 3.0, 1.0)
    assert all(row.holds for row in found.rows()) == (not gone)
    assert [(r.ours, r.other) for r in found.rows() if r.claim.startswith("job")] == [(10.0, 11.0)]


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.long
def test_a_small_soak(tmp_path: Path) -> None:
    """Six of the faults; what is left is as if they had not been."""
    pytest.importorskip("ray")
    found = soak.soak(6, 3, 60.0, tmp_path)
    assert found.survived == 6
    assert found.same
