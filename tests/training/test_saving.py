"""Checkpoints written beside the training: what they hold, when they are told of, and what happens when writing fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raycon.core.config import CheckpointConfig, EvalConfig
from raycon.training import checkpoint, loop
from raycon.training.runtime import LocalRuntime
from tests.training import test_loop
from tests.training.test_loop import config, go, same

SECONDS = 60.0
"""No wait in these tests takes long; this only keeps a broken one from hanging."""


class Told(LocalRuntime):
    """Notes what is reported, and what of it was complete by then; can fail like a process that dies there."""

    reports: list[tuple[int, bool, bool]]
    dies_at = -1

    def report(self, metrics: dict[str, float], path: Path | None, evaluate: bool) -> None:
        if metrics["step"] == self.dies_at:
            raise RuntimeError("killed")
        complete = path is not None and checkpoint.load(path).step == metrics["step"]
        self.reports.append((int(metrics["step"]), complete, evaluate))
        super().report(metrics, path, evaluate)


@pytest.fixture(autouse=True)
def _told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(Told, "reports", [], raising=False)
    monkeypatch.setattr(Told, "dies_at", -1)
    monkeypatch.setattr(test_loop, "LocalRuntime", Told)


def slow_writes(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> list[int]:
    """Let ``before(step)`` hold up the writing thread; returns the list that the most writers at once goes into."""
    real, lock, now, most = checkpoint.write, threading.Lock(), [0], [0]

    def write(folder: Path, taken: checkpoint.Taken) -> Path:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            before(taken.state["step"])
            return real(folder, taken)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(checkpoint, "write", write)
    return most


def at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> threading.Event:
    """Set when the loop has logged ``step``."""
    reached, real = threading.Event(), loop.log_step

    def log_step(*given: Any) -> None:
        real(*given)
        if given[5] >= step:
            reached.set()

    monkeypatch.setattr(loop, "log_step", log_step)
    return reached


def test_it_holds_the_state_of_its_step_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread writes step 6 only when step 11 is done; the file is as if nothing had gone on."""
    whole, _ = go(tmp_path / "a", config())
    reached = at_step(monkeypatch, 11)
    went_on: list[bool] = []

    def before(step: int) -> None:
        if step == 6:
            went_on.append(reached.wait(SECONDS))
            assert not list((tmp_path / "b").glob("checkpoints/0*"))

    most = slow_writes(monkeypatch, before)
    Told.reports.clear()
    trained, lines = go(tmp_path / "b", config())
    assert went_on == [True]
    assert most == [1]
    assert same(whole, trained)
    for step in ("00000006", "00000012", "00000018", "00000024"):
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            ours, theirs = (tmp_path / f / "checkpoints" / step / name for f in "ab")
            assert ours.read_bytes() == theirs.read_bytes()
    assert Told.reports == [(6, True, False), (12, True, False), (18, True, False), (24, True, False)]
    told = [r for r in lines if r["kind"] == "checkpoint"]
    assert [r["step"] for r in told] == [6, 12, 18, 24]
    assert all(r["checkpoint/bytes"] > 1000 and r["checkpoint/wait_s"] >= 0 for r in told)


def test_the_next_one_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a step, and a writer that never finishes before it is waited for."""
    waiting, real = threading.Event(), checkpoint.Buffers.copy
    saving = config(checkpoint=CheckpointConfig(every_steps=1, keep=2))
    from raycon.training.saving import Saving

    flush = Saving.flush

    def waited_for(self: Saving) -> None:
        waiting.set()
        flush(self)

    monkeypatch.setattr(Saving, "flush", waited_for)
    monkeypatch.setattr(Saving, "look", lambda self: None)

    def before(step: int) -> None:
        assert waiting.wait(SECONDS)

    most = slow_writes(monkeypatch, before)
    copies: list[dict[str, torch.Tensor]] = []

    def copy(self: checkpoint.Buffers, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        waiting.clear()
        copies.append(real(self, part, tensors))
        return copies[-1]

    monkeypatch.setattr(checkpoint.Buffers, "copy", copy)
    _, lines = go(tmp_path / "a", saving)
    assert most == [1]
    assert [step for step, _, _ in Told.reports] == list(range(1, 25))
    assert len({c[name].data_ptr() for c in copies[::2] for name in list(c)[:1]}) == 1  # memory is used again
    assert all(r["checkpoint/wait_s"] > 0 for r in lines if r["kind"] == "checkpoint")
    assert [p.name for p in checkpoint.steps(tmp_path / "a" / "checkpoints")] == ["00000022", "00000023", "00000024"]
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())[-1] == "last"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_ends_the_run_with_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = checkpoint._write

    def fails(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        if ".00000012." in str(file):
            raise OSError(number, "the disk")
        real(file, tensors)

    monkeypatch.setattr(checkpoint, "_write", fails)
    text = "00000012 could not be written, the disk is full.*00000006" if number == errno.ENOSPC else "the disk"
    kind = checkpoint.CheckpointError if number == errno.ENOSPC else OSError
    with pytest.raises(kind, match=text):
        go(tmp_path / "a", config())
    folder = tmp_path / "a" / "checkpoints"
    assert checkpoint.newest(folder) == (folder / "00000006", [])
    assert sorted(p.name for p in folder.iterdir()) == ["00000006", "last"]
    assert (folder / "last").resolve() == folder / "00000006"
    assert [step for step, _, _ in Told.reports] == [6]


def test_what_is_being_written_is_finished_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 6 is held up until the loss of step 8 is NaN and the run ends: it is there all the same."""
    ending = threading.Event()
    real = loop.FiniteGuard._stop

    def stop(self: loop.FiniteGuard, *given: Any) -> None:
        ending.set()
        real(self, *given)

    monkeypatch.setattr(loop.FiniteGuard, "_stop", stop)
    slow_writes(monkeypatch, lambda step: ending.wait(SECONDS))
    with pytest.raises(loop.NotFinite):
        go(tmp_path / "a", config(), poison=8)
    assert checkpoint.load(tmp_path / "a" / "checkpoints" / "last").step == 6
    assert Told.reports == []


def test_killed_between_save_and_report_it_is_still_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = go(tmp_path / "a", config())
    run = config(evals=EvalConfig(names=("knn",), every_epochs=1))
    monkeypatch.setattr(Told, "dies_at", 12)
    with pytest.raises(RuntimeError, match="killed"):
        go(tmp_path / "b", run)
    assert checkpoint.newest(tmp_path / "b" / "checkpoints")[0] == tmp_path / "b" / "checkpoints" / "00000012"
    monkeypatch.setattr(Told, "dies_at", -1)
    Told.reports.clear()
    trained, _ = go(tmp_path / "b", run)
    assert Told.reports == [(12, True, True), (18, True, True), (24, True, True)]
    assert same(whole, trained)


def test_what_a_killed_writer_left_goes_and_a_damaged_old_one_stops_nothing(tmp_path: Path) -> None:
    go(tmp_path / "a", config(checkpoint=CheckpointConfig(keep=0)))
    folder = tmp_path / "a" / "checkpoints"
    for path in checkpoint.steps(folder)[2:]:
        __import__("shutil").rmtree(path)
    (folder / ".00000018.123.part").mkdir()
    (folder / ".00000018.123.part" / checkpoint.MODEL).write_bytes(b"half")
    (folder / "00000006" / checkpoint.STATE).write_text("{")
    go(tmp_path / "a", config(checkpoint=CheckpointConfig(keep=1)))
    assert sorted(p.name for p in folder.iterdir()) == ["00000018", "00000024", "last"]
