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


@pytest.mark.slow
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


TRAIN = {
    "kind": "train",
    "epoch": 1,
    "epochs": 4,
    "step": 5,
    "steps": 9,
    "loss": 1.5,
    "lr": 0.1,
    "images_per_s": 1234.0,
}


def test_the_status_says_what_goes_on() -> None:
    status = log.Status()
    status.show({"kind": "state", "mining": 2})
    assert status.lines() == ["mining for epoch 3 ..."]
    status.show({"kind": "snapshot", "version": 2, "seconds": 1.25, "index/0/used": 60.0})
    status.show({**TRAIN, "time/step": 0.2, "time/data": 0.05, "gpu_memory_gb": 3.21, "health/effective_rank": 22.0})
    training, mining = status.lines()
    for words in ("loss 1.5", "1,234 images/s", "waiting for data 25%", "GPU 3.2 GB", "effective rank 22"):
        assert words in training
    assert mining == "mined snapshot 2 in 1.2 s, clusters in use 60"
    status.show({"kind": "state", "evaluating": 9})
    assert status.lines()[2] == "evaluating step 9 ..."
    status.show({"kind": "evaluation", "step": 0, "control": "pixels", "knn/top1_k1": 1.0})
    assert status.lines()[2] == "evaluating step 9 ..."
    status.show({"kind": "evaluation", "step": 9, "knn/top1_k1": 91.25})
    assert status.lines()[2] == "evaluated step 9: knn/top1_k1 91.25"


def test_json_lines_are_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    shown = log.display(quiet=True, as_json=True)
    shown.show(TRAIN)
    shown.show({"kind": "state", "mining": 0})
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        TRAIN,
        {"kind": "state", "mining": 0},
    ]


def test_plain_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    shown = log.display(quiet=False)
    assert isinstance(shown, log.PlainDisplay)
    with caplog.at_level("INFO", logger="raycon"):
        for record in (TRAIN, {"kind": "state", "mining": 0}, {"kind": "event", "text": "a shard was lost"}):
            shown.show(record)
    assert [r.message for r in caplog.records] == [log.summary(TRAIN), "a shard was lost"]
    assert isinstance(log.display(quiet=True), log.Quiet)


def test_the_live_display_takes_every_kind_of_record() -> None:
    shown = log.RichDisplay()
    shown.show({"kind": "start", "step": 0, "steps": 9})
    for record in (TRAIN | {"eta_s": 7.0}, {"kind": "state", "mining": 0}, {"kind": "event", "text": "[bold] is text"}):
        shown.show(record)
    assert shown._progress.tasks[0].completed == 5
    assert shown._progress.tasks[0].fields["left"] == "0:07 left"
    shown.close()


def test_states_are_not_tracked(tmp_path: Path) -> None:
    class Seen(log.NoTracker):
        steps: list[int] = []

        def log(self, step: int, values: Any) -> None:
            self.steps.append(step)

    metrics = log.Metrics(tmp_path / "m.jsonl", Seen())
    metrics.write("state", 1, mining=0)
    metrics.write("train", 2, loss=1.0)
    assert Seen.steps == [2]


def test_tensorboard_files_hold_numbers_and_evaluations(tmp_path: Path) -> None:
    import dataclasses
    import importlib.util

    if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        pytest.skip("neither tensorboard nor tensorboardX is installed")
    config = recipe("quickstart")
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, tensorboard=True))
    metrics = log.Metrics(tmp_path / "metrics.jsonl", log.open_tracker(config, tmp_path))
    metrics.write("train", 1, loss=1.0, text="no number")
    metrics.close()
    log.append_line(tmp_path / "metrics.jsonl", {"kind": "evaluation", "step": 1, "knn/top1_k1": 91.25})
    log.publish(config, tmp_path)
    data = b"".join(f.read_bytes() for f in sorted((tmp_path / "tensorboard").glob("events*")))
    assert b"loss" in data
    assert b"knn/top1_k1" in data
    assert b"method.temperature" in data
    assert b"| 1 | checkpoint | 91.25 |" in data


def test_trackers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses
    import importlib.util

    config = recipe("quickstart")
    assert log.tracker_problems(config) == []
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, tensorboard=True, wandb="offline"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wandb, tensorboard = log.tracker_problems(config)
    assert "raycon[wandb]" in wandb
    assert "raycon[tensorboard]" in tensorboard


def test_an_address_that_does_not_answer() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert not log.reachable(address, 0.5)  # bound, but nobody listens
        server.listen()
        assert log.reachable(address, 2.0)
    assert not log.reachable("no address")
