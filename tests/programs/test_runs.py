"""The runs registry over run directories made here: what is listed, chosen, compared, and what may be deleted."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycon import runs
from raycon.core import registry

OLD = 3600 * 24


def run(
    folder: Path,
    method: str = "pcl",
    temperature: float = 0.2,
    step: int = 100,
    knn: float | None = 90.0,
    age: float = OLD,
    start: dict[str, Any] | None = None,
    failure: str = "",
) -> Path:
    """A run directory of 100 steps and 10 epochs with two checkpoints, whose files last changed ``age`` seconds ago."""
    options = {"name": method, "temperature": temperature, "clusters": [60, 120]}
    config = {"recipe": "none", "seed": 0, "run": {"dir": str(folder)}, "method": options, "data": {"name": "digits"},
              "train": {"epochs": 10}, "evals": {"names": ["knn"]}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [
        {"kind": "start", "step": 0, "time": time.time() - age, "steps": 100, "pids": [2**22 + 7]} | (start or {})
    ]
    records += [{"kind": "train", "step": s, "loss": 8.0 - s / 50, "images_per_s": 1000.0} for s in (step // 2, step)]
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 999, "lo')  # torn by a kill
    for at in (step // 2, step):
        saved = folder / "checkpoints" / f"{at:08d}"
        saved.mkdir(parents=True)
        (saved / "state.json").write_text(json.dumps({"step": at, "steps": 100}))
        (saved / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "checkpoints" / "last").symlink_to(f"{step:08d}")
    if knn is not None:
        entries = [{"step": 0, "control": "pixels", "results": {"knn/top1": 1.0}}]
        entries += [{"step": at, "results": {"knn/top1": knn - 5 + 5 * at / step}} for at in (step, step // 2)]
        (folder / "evaluations.json").write_text(json.dumps(entries))
    if failure:
        (folder / "failure.json").write_text(json.dumps({"error": failure}))
    for place in [*folder.rglob("*"), folder]:
        os.utime(place, (time.time() - age,) * 2, follow_symlinks=False)
    return folder


def ask(arguments: list[object], capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    assert runs.main([str(a) for a in arguments]) == status
    told = capsys.readouterr()
    return told.err if status else told.out


def names(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()[1:]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "runs"
    run(place / "best", temperature=0.1, knn=95.0, age=OLD)
    run(place / "sweep" / "one", method="moco", knn=80.0, age=2 * OLD)
    run(place / "sweep" / "two", method="moco", temperature=0.07, step=60, knn=None, age=3 * OLD)
    run(place / "broken", step=40, knn=None, failure="loss not finite in step 41\nmore", age=4 * OLD)
    (place / "notes").mkdir()
    (place / ".cache").mkdir()
    return place


# --- list -------------------------------------------------------------------------------------------------------


def test_list(folder: Path, capsys: Any) -> None:
    told = ask(["list", folder], capsys)
    lines = told.splitlines()
    assert lines[0].split() == ["name", "status", "method", "data", "epoch", "epochs", "loss", "changed", "knn/top1"]
    assert names(told)[:4] == ["best", "sweep/one", "sweep/two", "broken"]
    assert lines[1].split()[1:7] == ["finished", "pcl", "digits", "10", "10", "6"]
    assert lines[1].split()[-1] == "95"
    assert lines[3].split()[1:7] == ["stopped", "moco", "digits", "6", "10", "6.8"]
    assert lines[3].split()[-1] == "-"
    assert lines[5] == "broken: loss not finite in step 41"
    assert "no runs in" in ask(["list", folder / "notes"], capsys)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["method=moco"], ["sweep/one", "sweep/two"]),
        (["method.temperature<=0.1"], ["best", "sweep/two"]),
        (["method=moco", "method.temperature>0.1"], ["sweep/one"]),
        (["knn/top1>85"], ["best"]),
        (["knn/top1!=95"], ["sweep/one", "sweep/two", "broken"]),
        (["status=failed"], ["broken"]),
        (["name~SWEEP"], ["sweep/one", "sweep/two"]),
        (["epoch<10"], ["sweep/two", "broken"]),
        (["method.clusters=60 120", "loss<7"], ["best", "sweep/one", "sweep/two"]),
    ],
)
def test_where(folder: Path, conditions: list[str], expected: list[str], capsys: Any) -> None:
    asked = [part for c in conditions for part in ("--where", c)]
    found = json.loads(ask(["list", folder, *asked, "--json"], capsys))
    assert [r["name"] for r in found] == expected


def test_sort_and_columns(folder: Path, capsys: Any) -> None:
    told = ask(["list", folder, "--sort", "knn/top1", "--columns", "method.temperature", "images_per_s"], capsys)
    assert names(told)[:4] == ["best", "sweep/one", "sweep/two", "broken"]
    assert told.splitlines()[0].split()[-3:] == ["knn/top1", "method.temperature", "images_per_s"]
    told = ask(["list", folder, "--sort", "method.temperature", "--ascending", "--limit", "2"], capsys)
    assert names(told) == ["sweep/two", "best"]


def test_the_newest_numbers_count(folder: Path) -> None:
    found = registry.read(folder / "best")
    assert (found.step, found.results, found.train["loss"]) == (100, {"knn/top1": 95.0}, 6.0)
    assert [e["step"] for e in found.evaluations] == [50, 100]


def test_damaged_files_are_told_and_stop_nothing(folder: Path, capsys: Any) -> None:
    (folder / "best" / "config.yaml").write_text("{: no")
    (folder / "sweep" / "one" / "evaluations.json").write_text("[")
    (folder / "broken" / "metrics.jsonl").unlink()
    told = ask(["list", folder], capsys)
    assert "best: config.yaml:" in told
    assert "sweep/one: evaluations.json:" in told
    assert {line.split()[0]: line.split()[1] for line in told.splitlines()[1:5]}["best"] == "unreadable"


# --- what runs --------------------------------------------------------------------------------------------------


def here(pid: int, since: float) -> dict[str, Any]:
    return {"pids": [pid], "hosts": [socket.gethostname()], "time": since}


def test_status(tmp_path: Path) -> None:
    now, minute = time.time(), 60.0
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "alive": ({"start": here(os.getpid(), now), "step": 60}, "running"),
        "its number was given to another": ({"start": here(os.getpid(), now - 10**7), "step": 60}, "stopped"),
        "gone": ({"start": here(2**22 + 7, now), "step": 60, "age": 5 * minute}, "stopped"),
        "perhaps starting again": ({"start": here(2**22 + 7, now), "step": 60, "age": minute}, "running"),
        "elsewhere": ({"start": {"hosts": ["other"]}, "step": 60, "age": 30 * minute}, "running"),
        "long quiet elsewhere": ({"start": {"hosts": ["other"]}, "step": 60, "age": 61 * minute}, "stopped"),
        "evaluating": ({"start": here(2**22 + 7, now), "knn": None, "age": 5 * minute}, "running"),
        "evaluated": ({"start": here(2**22 + 7, now), "age": 0.0}, "finished"),
        "failed": ({"step": 60, "age": 0.0, "failure": "why"}, "failed"),
    }
    for name, (given, expected) in cases.items():
        assert registry.read(run(tmp_path / name, **given)).status == expected, name
    asked = run(tmp_path / "asked to stop", step=60, age=5 * minute)
    assert registry.read(asked).status == "running"
    (asked / "stop").touch()
    assert registry.read(asked).status == "stopped"


# --- show and compare -------------------------------------------------------------------------------------------


def test_show(folder: Path, capsys: Any) -> None:
    told = ask(["show", folder / "best"], capsys)
    assert "finished, step 100 of 100" in told
    assert "  method.temperature               0.1\n" in told
    assert re.search(r"Evaluations\n +step +knn/top1\n +50 +92\.5\n +100 +95\n", told)
    assert "2 checkpoints\n  checkpoints/00000050  1.0 kB" in told
    assert str(folder) not in told.split("Options")[1].split("Training")[0]  # where it lies is no option


def test_show_knows_the_recipe(tmp_path: Path, capsys: Any) -> None:
    from raycon.core.config import override, save_yaml
    from raycon.recipes import recipe

    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    save_yaml(override(recipe("quickstart"), {"method.temperature": 0.5}), tmp_path / "r" / "config.yaml")
    told = ask(["show", tmp_path / "r"], capsys)
    assert "differ from the recipe\n  method.temperature               0.5\n\n" in told


def test_compare(folder: Path, capsys: Any) -> None:
    places = [folder / "best", folder / "sweep" / "one"]
    told = ask(["compare", *places], capsys)
    assert [line.split() for line in told.splitlines() if line.startswith("method")] == [
        ["method.name", "pcl", "moco"], ["method.temperature", "0.1", "0.2"],
    ]  # fmt: skip
    found = json.loads(ask(["compare", *places, "--json"], capsys))
    assert found["options"] == {"method.name": ["pcl", "moco"], "method.temperature": [0.1, 0.2]}
    assert found["numbers"]["knn/top1"] == [95.0, 80.0]


# --- prune ------------------------------------------------------------------------------------------------------


def test_prune_never_touches_what_runs(folder: Path, capsys: Any) -> None:
    run(folder / "busy", method="moco", step=60, start=here(os.getpid(), time.time()), age=OLD)
    (folder / "best" / "config.yaml").write_text("{: no")
    told = ask(["prune", folder, "--where", "step>0", "--yes"], capsys)
    assert "left alone: busy (running" in told
    assert "left alone: best (its configuration cannot be read)" in told
    assert "deleted 3 of 3 folders" in told
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("config.yaml"))
    assert left == ["best/config.yaml", "busy/config.yaml"]
    assert len(list((folder / "busy" / "checkpoints").glob("0*"))) == 2
    assert not list(folder.rglob(".deleted*"))


def test_prune_looks_again_before_it_deletes(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed while the question stood is left alone."""

    def resumed(question: str) -> bool:
        record = {"kind": "start", "step": 60, "steps": 100} | here(os.getpid(), time.time())
        with (folder / "sweep" / "two" / "metrics.jsonl").open("a") as handle:
            handle.write("\n" + json.dumps(record) + "\n")
        return True

    monkeypatch.setattr(runs, "_agreed", resumed)
    told = ask(["prune", folder, "--where", "method=moco"], capsys)
    assert "left alone: sweep/two (running" in told
    assert "deleted 1 of 2 folders" in told
    assert (folder / "sweep" / "two" / "config.yaml").is_file()
    assert not (folder / "sweep" / "one").exists()


def test_prune_asks(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ask(["prune", folder, "--where", "status=failed"], capsys, status=2)
    assert "no terminal to ask on; --yes deletes" in error
    for answer, left in (("no\n", True), ("\n", True), ("yes\n", False)):
        monkeypatch.setattr(sys, "stdin", _Terminal(answer))
        told = ask(["prune", folder, "--where", "status=failed"], capsys)
        assert "broken" in told
        assert ("nothing was deleted" in told) == left
        assert (folder / "broken").exists() == left
    assert "nothing to delete" in ask(["prune", folder, "--where", "status=failed"], capsys)


class _Terminal:
    def __init__(self, answer: str) -> None:
        self._answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._answer


def test_prune_of_checkpoints_keeps_the_newest(folder: Path, capsys: Any) -> None:
    half = folder / "best" / "checkpoints" / "00000200"  # newer, but not complete
    half.mkdir()
    told = ask(["prune", folder, "--where", "name=best", "--checkpoints", "--yes"], capsys)
    assert "2 checkpoints of" in told
    assert sorted(p.name for p in (folder / "best" / "checkpoints").iterdir()) == ["00000100", "last"]
    assert (folder / "best" / "checkpoints" / "last" / "state.json").is_file()
    assert len(runs.checkpoints(folder / "sweep" / "one")) == 2


# --- requests ---------------------------------------------------------------------------------------------------


def test_wrong_requests(folder: Path, capsys: Any) -> None:
    cases: list[tuple[list[object], str]] = [
        (["list", folder / "nowhere"], "nowhere: no such folder"),
        (["list", folder, "--where", "method.temprature=1"], "did you mean 'method.temperature'"),
        (["list", folder, "--where", "method"], "give KEY=VALUE"),
        (["list", folder, "--sort", "knn/top5"], "--sort 'knn/top5': no run has it; did you mean 'knn/top1'"),
        (["list", folder, "--columns", "methd"], "did you mean 'method'"),
        (["list", folder, "--limit", "-1"], "--limit -1"),
        (["show", folder], "no run directory"),
        (["compare", folder / "best"], "needs two run directories"),
        (["prune", folder], "say which runs with --where"),
    ]
    for arguments, words in cases:
        assert words in ask(arguments, capsys, status=2), arguments


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom raycon import runs\n"
        "try:\n    runs.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'ray', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout
