"""Faults that need no cluster: full disks, two runs in one directory, a command given again, a change of world size."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raycon import pretrain
from raycon.core.config import ConfigError, RunConfig, ScalingConfig, elastic_problems, world_sizes
from raycon.core.log import read_lines
from raycon.recipes import recipe
from raycon.training import checkpoint, job, loop
from tests.helpers import on_ranks

TINY = [
    "quickstart", "--runtime=local", "--data.loader=torch", "--train.epochs=2", "--train.warmup-epochs=0",
    "--method.warmup-epochs=1", "--method.clusters", "20", "--method.negatives=10", "--mining.redo=1", "--mining.iterations=2",
    "--log.every-steps=1", "--evals.names", "--model.width=8", "--log.report=light",
    "--checkpoint.every-epochs=1",
]  # fmt: skip


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(folder: Path, step: int, value: float) -> Path:
    torch.manual_seed(0)
    module = nn.Linear(200, 200)
    nn.init.constant_(module.weight, value)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    return checkpoint.save(folder, module, optimizer, None, {"step": step, "evaluate": False})


def test_a_full_disk_costs_no_good_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    good = save(folder, 10, 1.0)
    before = {f.name: f.read_bytes() for f in good.iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="the disk is full") as caught, no_file_above(100_000):
        save(folder, 20, 2.0)
    assert str(good) in str(caught.value)
    assert f"--resume {tmp_path / 'run'}" in str(caught.value)
    assert {f.name: f.read_bytes() for f in good.iterdir()} == before
    assert sorted(p.name for p in folder.iterdir()) == ["00000010", "last"]  # no half checkpoint
    assert checkpoint.load(folder / "last").step == 10
    assert save(folder, 20, 2.0) == checkpoint.newest(folder)[0]


def test_other_errors_of_the_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(checkpoint, "_write", broken)
    with pytest.raises(OSError, match="dying"):
        save(tmp_path, 1, 1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain.main([*TINY, f"--run.dir={folder}", "--log.quiet"]) == 0
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.slow
def test_the_same_command_goes_on_another_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the midst of its second epoch, then given again as it was: as if it had never stopped."""
    folder = tmp_path / "run"
    command = [*TINY, f"--run.dir={folder}", "--log.quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(job, "STOPS", ())

        def dies(config: RunConfig, step: int, *rest: int) -> bool:
            if step == 15:
                raise RuntimeError("the machine is gone")
            return step % 11 == 0

        patch.setattr(loop, "due", dies)
        assert pretrain.main(command) == 1
    assert losses(folder)[-1][0] == 15
    assert pretrain.main(command) == 0
    assert losses(folder) == losses(whole)
    name = "checkpoints/last/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    capsys.readouterr()
    assert pretrain.main([*command, "--train.lr=0.5"]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert losses(folder) == losses(whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    """The newest one has lost a byte: the run goes on from the one before, says so, and ends with the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    newest = folder / "checkpoints" / "00000022"
    assert (folder / "checkpoints" / "last").resolve() == newest
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert pretrain.main(["--resume", str(folder), "--log.quiet"]) == 0
    lines = list(read_lines(folder / "metrics.jsonl"))
    assert [r["step"] for r in lines if r["kind"] == "start"] == [0, 11]
    (said,) = [r["text"] for r in lines if r["kind"] == "event" and "passed over" in r["text"]]
    assert f"{newest}/model.safetensors: missing, cut off or altered" in said
    assert losses(folder) == losses(whole)
    name = "checkpoints/last/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_goes_on_later(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "00000022")
    good = folder / "checkpoints" / "00000011"
    before = {f.name: f.read_bytes() for f in good.iterdir()}
    with no_file_above(100_000):
        assert pretrain.main(["--resume", str(folder), "--log.quiet"]) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert f"the last good checkpoint is {good}" in said
    assert f"--resume {folder}" in said
    assert "Traceback" not in said
    assert {f.name: f.read_bytes() for f in good.iterdir()} == before
    assert pretrain.main(["--resume", str(folder), "--log.quiet"]) == 0
    assert losses(folder) == losses(whole)
    name = "checkpoints/last/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def _with_a_slow_rank(folder: str) -> None:
    """A rank of a run in which rank 1 waits for its images."""
    from raycon import data_loaders
    from raycon.core import dist

    opened = data_loaders.open_loader

    def open_slow(*args: Any) -> Any:
        loader = opened(*args)
        train = loader.train

        def slow(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for batch in train(*args, **kwargs):
                time.sleep(0.3)  # the fault itself: far more than a batch of these takes
                yield batch

        loader.train = slow
        return loader

    if dist.rank() == 1:
        data_loaders.open_loader = open_slow
    options = ["--train.epochs=1", "--method.warmup-epochs=1", f"--run.dir={folder}", "--log.quiet"]
    assert pretrain.main([*TINY, *options]) == 0


@pytest.mark.ranks
def test_a_slow_rank_is_seen_in_the_metrics(tmp_path: Path) -> None:
    on_ranks(2, _with_a_slow_rank, str(tmp_path / "run"))
    train = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["ranks/slowest"] for r in train] == [1] * 11
    assert all(r["ranks/slowest_s"] >= 0.3 for r in train)


HOLDER = """
import sys
from pathlib import Path
from raycon.pretrain import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_of_two_runs_in_one_directory_is_refused(tmp_path: Path) -> None:
    """While the first lives; when it was killed, however that was, the directory is free."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"being trained in by process {first.pid} "):
            pretrain.lock(folder)
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
    pretrain.lock(folder).close()


def elastic(low: int, high: int, batch: int = 24, accumulate: int = 1) -> RunConfig:
    base = recipe("quickstart")
    train = dataclasses.replace(base.train, batch=batch, accumulate=accumulate)
    return dataclasses.replace(base, train=train, scaling=ScalingConfig(min_workers=low, workers=high))


def test_the_command_line_of_an_elastic_run() -> None:
    config, _ = pretrain.parse(["quickstart", "--scaling.workers", "1:8", "--train.lr=0.5"])
    assert (config.scaling.min_workers, config.scaling.workers, config.train.lr) == (1, 8, 0.5)
    config, _ = pretrain.parse(["quickstart", "--scaling.workers=3"])
    assert (config.scaling.min_workers, config.scaling.workers) == (0, 3)
    for wrong in ("8:1", "0:4", "a:b", "1:2:3"):
        with pytest.raises(ConfigError, match="MIN:MAX"):
            pretrain.parse(["quickstart", f"--scaling.workers={wrong}"])


def test_only_numbers_of_workers_that_divide_the_batch() -> None:
    assert world_sizes(elastic(1, 8)) == [1, 2, 3, 4, 6, 8]
    assert world_sizes(elastic(0, 5)) == [5]
    assert elastic_problems(elastic(1, 8)) == []
    (problem,) = elastic_problems(elastic(5, 8))
    assert "train.batch = 24" in problem
    assert "scaling.min_workers = 5" in problem
    assert any("scaling.min_workers = 9" in p for p in elastic_problems(elastic(9, 8)))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_batch_stays_and_no_micro_batch_grows(accumulate: int) -> None:
    config = elastic(1, 8, accumulate=accumulate)
    largest = 24 // (8 * accumulate)
    for world in world_sizes(config):
        fitted, updates = job.fit_to_world(config, world)
        parts = fitted.train.accumulate
        assert updates == 1
        assert 24 % (world * parts) == 0
        assert 24 // (world * parts) <= largest
    assert job.fit_to_world(config, 8) == (config, 1)
    assert job.fit_to_world(elastic(0, 8), 2)[0].train.accumulate == 1


def test_or_a_worker_keeps_its_batch_and_the_steps_are_more() -> None:
    config = elastic(1, 8)
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, on_fewer="follow"))
    assert [job.fit_to_world(config, world) for world in (1, 2, 4, 8)] == [(config, n) for n in (8, 4, 2, 1)]


def test_the_ranks_that_do_not_answer(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from raycon.on_ray.runtime import silent_ranks

    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: silent_ranks(tmp_path, r, 4, seconds=1.0)}))
        for r in (0, 3, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [2], 1: [2], 3: [2]}
    assert silent_ranks(tmp_path, 2, 4, seconds=60.0) == []  # returns at once: all have called


@pytest.mark.slow
def test_no_secret_is_written(tmp_path: Path) -> None:
    """Keys of the environment come neither into configurations nor logs, wandb's files or the report."""
    planted = "planted-0123456789abcdef0123456789abcdef"
    environment = os.environ | {
        "WANDB_API_KEY": planted, "AWS_SECRET_ACCESS_KEY": planted, "RAY_AUTH_TOKEN": planted, "HF_TOKEN": planted,
    }  # fmt: skip
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "raycon.pretrain", *TINY, f"--run.dir={folder}", "--log.wandb=offline"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert planted not in done.stdout + done.stderr
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert any("wandb" in f.parts for f in files)
    assert (folder / "report.html") in files
    holding = [f for f in files if planted.encode() in f.read_bytes()]
    assert holding == []
