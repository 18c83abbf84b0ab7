"""A finished little run to do bad things with, and how a refusal is looked at."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from raycon.core.config import EvalConfig, RunConfig, override, save_yaml
from raycon.recipes import recipe

PROGRAMS = {
    "pretrain": "raycon.pretrain",
    "evaluate": "raycon.evaluate",
    "embed": "raycon.embed",
    "export": "raycon.export",
    "data": "raycon.data",
    "runs": "raycon.runs",
    "report": "raycon.report.__main__",
    "index": "raycon.index.__main__",
    "doctor": "raycon.doctor",
    "sweep": "raycon.tuning.sweep",
    "submit": "raycon.cluster.submit",
    "lister": "raycon.__main__",
}


def small() -> RunConfig:
    """The quickstart, as narrow as it gets and in this process."""
    base = override(
        recipe("quickstart"), {"model.width": 2, "train.epochs": 1, "train.warmup_epochs": 0, "runtime": "local"}
    )
    return dataclasses.replace(base, evals=EvalConfig(names=("knn",)))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint, as training leaves it (without having trained)."""
    from raycon.nn import optim
    from raycon.training import checkpoint, job

    config, run_dir = small(), tmp_path_factory.mktemp("finished") / "run"
    dataset = job.open_data(config)
    facts = job.facts_of(config, dataset, 1)
    method = job.build_method(config, facts, 1)
    run_dir.mkdir()
    save_yaml(config, run_dir / "config.yaml")
    (run_dir / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "steps": 11, "time": 0}\n')
    (run_dir / "evaluations.json").write_text('[{"step": 11, "epoch": 1, "results": {}, "failed": {}, "seconds": {}}]')
    state = {"step": 11, "epoch": 1, "steps": 11, "per_epoch": 11, "world": 1, "evaluate": False}
    optimizer = optim.build_optimizer(method, config.train)
    checkpoint.save(run_dir / "checkpoints", method, optimizer, None, state)
    return run_dir


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a case, with a home of its own: all that a program could write lies below ``tmp_path``."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RAYCON_STORAGE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run_dir(place: Path, finished: Path) -> Path:
    """A copy of ``finished`` named ``run`` in the current folder."""
    shutil.copytree(finished, place / "run", symlinks=True)
    return place / "run"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below: time of change and bytes."""
    return {
        str(p.relative_to(folder)): (
            p.lstat().st_mtime_ns if not p.is_dir() else 0,
            p.read_bytes() if p.is_file() else b"",
        )
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, list[str]], str]:
    """Calls a program that must refuse: its exit status is not 0, its message no traceback, and nothing has changed.

    Gives the message, on one line.
    """

    def call(program: str, arguments: list[str]) -> str:
        before = contents(place.parent)
        try:
            status = importlib.import_module(PROGRAMS[program]).main(arguments)
        except SystemExit as stop:  # the refusals of tyro and argparse
            status = stop.code
        said = capsys.readouterr()
        assert status in (1, 2), (status, said)
        assert "Traceback" not in said.err, said.err
        assert contents(place.parent) == before, "something was written"
        words = " ".join(said.err.replace("│", " ").split())
        assert len(words) < 6000, "nobody reads that much"
        return words

    return call
