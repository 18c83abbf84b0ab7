from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
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


def wandb_records(run_dir: Path) -> list[Any]:
    """The records of a run directory's offline wandb runs, oldest first; waits until wandb has written the last of each."""
    deadline = time.monotonic() + 120
    found: list[Any] = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        while not (records := read_wandb(file)) or records[-1].WhichOneof("record_type") != "exit":
            assert time.monotonic() < deadline, f"{file} has no end"
            time.sleep(0.05)
        found += records
    return found


def read_wandb(file: Path) -> list[Any]:
    """The whole records of a .wandb file (LevelDB's log format)."""
    import struct

    from wandb.proto import wandb_internal_pb2

    found: list[Any] = []
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def wandb_history(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, an item per call."""
    calls = [r.history for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "history"]
    found: list[dict[str, Any]] = []
    for call in calls:
        found.append({})
        for item in call.item:
            *outer, last = item.nested_key or [item.key]
            place = found[-1]
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = json.loads(item.value_json)
    return found


@pytest.mark.slow
def test_wandb_gets_numbers_pictures_and_tables_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from PIL import Image

    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    config = recipe("quickstart")
    config = dataclasses.replace(config, log=dataclasses.replace(log_config("offline"), wandb_ranks=True))
    run_dir = tmp_path / "run-1"
    run_dir.mkdir()
    log.append_line(run_dir / "metrics.jsonl", {"kind": "evaluation", "step": 4, "knn/top1_k1": 91.25})
    metrics = log.Metrics(run_dir / "metrics.jsonl", log.open_tracker(config, run_dir))
    metrics.write("train", 10, loss=1.0, text="not a number")
    metrics.relay()
    metrics.relay()
    metrics.close()
    log.append_line(run_dir / "metrics.jsonl", {"kind": "evaluation", "step": 9, "knn/top1_k1": 92.5})
    picture = io.BytesIO()
    Image.new("RGB", (5, 7), "#123456").save(picture, "PNG")
    (run_dir / "report.html").write_text("the page")
    table = (["n", "shown"], [[1, picture.getvalue()], [2, picture.getvalue()]])
    log.publish(config, run_dir, 9, {"report/map": picture.getvalue()}, {"report/clusters": table})
    assert wandb.run is None

    history = wandb_history(run_dir)
    assert [h["loss"] for h in history if "loss" in h] == [1.0]
    assert "not a number" not in str(history)
    assert sorted(calls := [h["_step"] for h in history]) == calls
    assert len(set(calls)) == len(calls)
    # Each evaluation once, live or late, at its own step.
    assert [(h["step"], h["knn/top1_k1"]) for h in history if "knn/top1_k1" in h] == [(4, 91.25), (9, 92.5)]
    logged = {k: v for h in history for k, v in h.items() if isinstance(v, dict) and "_type" in v}
    assert {k: v["_type"] for k, v in logged.items()} == {
        "evaluations": "table-file",
        "report/clusters": "table-file",
        "report/map": "image-file",
    }
    (folder,) = (f for f in run_dir.glob("wandb/offline-run-*/files") if (f / "media").is_dir())
    with Image.open(folder / logged["report/map"]["path"]) as image:
        assert (image.size, image.getpixel((2, 3))) == ((5, 7), (0x12, 0x34, 0x56))
    artifacts = [r.artifact for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "artifact"]
    kept = {c.path: Path(c.local_path) for c in next(a for a in artifacts if "clusters" in a.name).manifest.contents}
    lines = json.loads(kept["report/clusters.table.json"].read_text())
    assert (lines["columns"], [line[0] for line in lines["data"]]) == (["n", "shown"], [1, 2])
    assert all(kept[line[1]["path"]].read_bytes()[:4] == b"\x89PNG" for line in lines["data"])
    assert json.loads((folder / logged["evaluations"]["path"]).read_text())["data"] == [
        [4, "checkpoint", 91.25],
        [9, "checkpoint", 92.5],
    ]
    assert (folder / "report.html").read_text() == "the page"
    runs = [r.run for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "run"]
    assert len({r.run_id for r in runs}) == 1  # it goes on in the same run
    assert runs[0].run_id.startswith("run-1-")
    assert {r.run_group for r in runs} == {"run-1"}
    options = {i.key: json.loads(i.value_json) for i in runs[0].config.update}
    assert options["method.temperature"] == config.method.temperature  # type: ignore[attr-defined]

    # A rank gives its times, in a run of its own of the same group.
    before = len(wandb_history(run_dir))
    rank = log.NoMetrics(log.open_tracker(config, run_dir, rank=1))
    rank.write("train", 10, loss=1.0, **{"time/data": 0.25})
    rank.write("event", 10, text="no")
    rank.close()
    assert [{k: v for k, v in h.items() if not k.startswith("_")} for h in wandb_history(run_dir)[before:]] == [
        {"time/data": 0.25, "step": 10}
    ]
    last = [r.run for r in wandb_records(run_dir) if r.WhichOneof("record_type") == "run"][-1]
    assert (last.run_group, last.job_type, last.run_id) == ("run-1", "rank", log.wandb_identity(run_dir, 1)[0])
    assert not log.open_tracker(dataclasses.replace(config, log=log_config("offline")), run_dir, rank=1)


def test_wandb_is_offline_off_the_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(log, "reachable", lambda address: False)
    assert log.wandb_mode("online", tmp_path) == "offline"
    monkeypatch.setattr(log, "reachable", lambda address: True)
    assert log.wandb_mode("online", tmp_path) == "online"
    assert log.wandb_mode("offline", tmp_path) == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert log.wandb_mode("online", tmp_path) == "offline"


def test_run_directories_of_one_name_are_two_wandb_runs(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "trial 1", tmp_path / "b" / "trial 1"
    for folder in (one, other):
        folder.mkdir(parents=True)
    identity, calls = log.wandb_identity(one)
    assert re.fullmatch("trial-1-[0-9a-f]{6}", identity)
    for _ in range(7):
        log.append_line(one / "metrics.jsonl", {"kind": "train"})
    # Parts of one run are numbered on, also when a resume has dropped lines.
    again, second = log.wandb_identity(one)
    (one / "metrics.jsonl").unlink()
    third = log.wandb_identity(one)
    assert (again, third[0]) == (identity, identity)
    assert calls + 7 < second < third[1]
    assert log.wandb_identity(other)[0] != identity
    assert re.fullmatch("trial-1-rank3-[0-9a-f]{6}", log.wandb_identity(one, 3)[0])


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
    assert status.lines()[2] == "step 9 is to be evaluated ..."
    status.show({"kind": "evaluation", "step": 0, "control": "pixels", "knn/top1_k1": 1.0})
    assert status.lines()[2] == "step 9 is to be evaluated ..."
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


def test_log_lines_are_printed_above_the_live_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import logging

    log.attach_log_file(tmp_path, quiet=False)  # before the display, as a run does
    try:
        screen = io.StringIO()
        monkeypatch.setattr(sys, "stderr", screen)  # where a live display puts itself
        logging.getLogger("raycon").warning("stopping: saving a checkpoint first")
        assert screen.getvalue() == "stopping: saving a checkpoint first\n"
        log.attach_log_file(tmp_path, quiet=True)
        logging.getLogger("raycon").info("not when quiet")
        assert "not when quiet" not in screen.getvalue()
        assert "not when quiet" in (tmp_path / "log.txt").read_text()
    finally:
        for handler in list(logging.getLogger("raycon").handlers):
            logging.getLogger("raycon").removeHandler(handler)
            handler.close()
        logging.getLogger("raycon").propagate = True


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
    log.publish(config, tmp_path, 1, {}, {"of pictures": (["n", "shown"], [[7, b"png"]])})
    data = b"".join(f.read_bytes() for f in sorted((tmp_path / "tensorboard").glob("events*")))
    assert b"loss" in data
    assert b"knn/top1_k1" in data
    assert b"method.temperature" in data
    assert b"| 1 | checkpoint | 91.25 |" in data
    assert b"| 7 |" in data  # without its column of pictures


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
