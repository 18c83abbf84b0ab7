from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raycon.core import log
from raycon.recipes import recipe


class Shown:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def show(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_a_follower_shows_every_line_once_also_after_a_rewind(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = log.Metrics(file)
    metrics.write("train", 1, loss=1.0)  # before the follower: another part of the run
    shown = Shown()
    with log.Follower(file, shown, poll_s=0.01):
        metrics.write("train", 2, loss=2.0)
        metrics.write("train", 3, loss=3.0)
    assert [r["step"] for r in shown.records] == [2, 3]
    assert shown.closed
    metrics.rewind(1)
    assert [r["step"] for r in log.read_lines(file)] == [1]


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log.Metrics(file).write("train", 1, loss=1.0)
    with file.open("a") as handle:
        handle.write('{"kind": "train", "st')
    assert [r["step"] for r in log.read_lines(file)] == [1]


def test_a_rewind_keeps_evaluations(tmp_path: Path) -> None:
    metrics = log.Metrics(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        metrics.write("train", step, loss=0.0)
        metrics.write("evaluation", step, accuracy=1.0)
    metrics.rewind(1)
    kept = [(r["kind"], r["step"]) for r in log.read_lines(tmp_path / "m.jsonl")]
    assert kept == [("train", 1), ("evaluation", 1), ("evaluation", 2), ("evaluation", 3)]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"kind": "train", "epoch": 1, "step": 5, "steps": 9, "loss": 1.5, "lr": 0.1, "images_per_s": 1234.0, "eta_s": 3700.0},
            ["epoch 2", "5/9", "1.5", "1,234 images/s", "1:01:40 left"],
        ),
        ({"kind": "snapshot", "epoch": 0, "version": 3, "seconds": 2.0, "index/0/used": 60.0}, ["snapshot 3", "2.0 s", "60"]),
        ({"kind": "evaluation", "step": 7, "knn/top1_k1": 91.25}, ["step 7", "knn/top1_k1 91.25"]),
        ({"kind": "event", "text": "a shard was lost"}, ["a shard was lost"]),
    ],
)  # fmt: skip
def test_lines_a_person_can_read(record: dict[str, Any], words: list[str]) -> None:
    for word in words:
        assert word in log.summary(record)


def test_wandb_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = recipe("quickstart")
    config = __import__("dataclasses").replace(config, log=log_config("offline"))
    run_dir = tmp_path / "run-1"
    run_dir.mkdir()
    tracker = log.Wandb(config, run_dir)
    metrics = log.Metrics(run_dir / "metrics.jsonl", tracker)
    metrics.write("train", 1, loss=1.0, text="not a number")
    metrics.close()
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert wandb.run is None


def log_config(mode: str) -> Any:
    from raycon.core.config import LogConfig

    return LogConfig(wandb=mode)  # type: ignore[arg-type]


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    file = tmp_path / "m.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: log.append_line(file, {"kind": "event", "i": i, "pad": "x" * 3000}), range(100)))
    assert sorted(json.loads(line)["i"] for line in file.read_text().splitlines()) == list(range(100))
