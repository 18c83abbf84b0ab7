"""Wrong sweeps: exit status 2, one message with every problem by name, nothing created. No Ray is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raycon.recipes import recipe
from raycon.tuning import sweep, trainable
from raycon.tuning.study import find

STUDY = "digits-temperature"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    before = sorted(folder.rglob("*"))
    try:
        status = sweep.main(arguments)
    except SystemExit as stop:  # argparse's and tyro's own refusals
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before
    return " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["give a STUDY", "sce-temperature", "fashion-temperature"]),
        (["sce-temprature"], ["did you mean 'sce-temperature'"]),
        ([STUDY, "--space", "method.temprature=uniform(0, 1)"], ["unknown option 'method.temprature'", "method.temperature"]),
        ([STUDY, "--space", "method.temperature=uniform(0, 1)"], ["method.temperature = uniform(0, 1)", "above 0"]),
        ([STUDY, "--space", "method.temperature=normal(0, 1)"], ["normal(0, 1)", "loguniform(low, high)"]),
        ([STUDY, "--space", "train.lr=none"], ["does not search train.lr"]),
        ([STUDY, "--metric", "knn/top1_k21"], ["--metric knn/top1_k21", "knn gives knn/top1_k20"]),
        ([STUDY, "--metric", "svn/top1"], ["no evaluation 'svn'", "linear"]),
        ([STUDY, "--metric", "knn"], ["no evaluation 'knn'"]),
        ([STUDY, "--metric", "knn@cifar100/top1_k20"], ["another data set's test split"]),
        ([STUDY, "--trials", "0", "--validation", "1.5"], ["--trials 0", "--validation 1.5"]),
        ([STUDY, "--grace-epochs", "9"], ["--grace-epochs 9", "train.epochs = 4"]),
        ([STUDY, "--every-epochs", "3"], ["--every-epochs 3", "--grace-epochs 1"]),
        ([STUDY, "--space", "train.epochs=integers(2, 4)"], ["train.epochs is the time"]),
        ([STUDY, "--scheduler", "pbt", "--searcher", "tpe"], ["tpe does not go with --scheduler pbt"]),
        ([STUDY, "--scheduler", "pbt", "--space", "method.temperature=none"], ["method.head cannot change"]),
        ([STUDY, "--searcher", "grid", "--trials", "3"], ["smallest grid has 4 points"]),
        ([STUDY, "--scheduler", "hyperbanana"], ["--scheduler", "hyperband"]),
        ([STUDY, "--method.temprature", "1"], ["--method.temprature", "--method.temperature"]),
        ([STUDY, "--train.batch", "63"], ["method.queue = 512", "train.batch = 63"]),
        ([STUDY, "--recipe", "quickstart", "--config", "x.yaml"], ["give one of them"]),
        ([STUDY, "--max-concurrent", "-1"], ["--max-concurrent -1"]),
        (["--resume"], ["--resume: give the directory"]),
        (["--resume", "nowhere"], ["nowhere holds no sweep"]),
        (["--resume", "nowhere", "--trials", "9"], ["--resume takes its settings", "--trials"]),
        (["maskcon-weight", "--data.name", "digits", "--data.views", "digits"], ["needs weak labels"]),
    ],
)  # fmt: skip
def test_wrong_requests(
    options: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(options, capsys, tmp_path)
    for word in words:
        assert word in error, error


def test_all_problems_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(
        [STUDY, "--trials", "0", "--metric", "knn/top1", "--space", "method.x=uniform(0, 1)", "--train.lr", "-1"],
        capsys,
        tmp_path,
    )
    assert "4 problems" in error
    for word in ("--trials 0", "--metric knn/top1", "'method.x'", "train.lr = -1"):
        assert word in error


def test_directories_are_not_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert "is not empty" in refused([STUDY, "--dir", str(tmp_path / "used")], capsys, tmp_path)


def test_one_process_runs_a_sweep(tmp_path: Path) -> None:
    lock = sweep.alone(tmp_path)
    with pytest.raises(ValueError, match="is being run by another process"):
        sweep.alone(tmp_path)
    lock.close()
    sweep.alone(tmp_path).close()


def test_a_table_loses_the_lines_of_the_held_out_images(tmp_path: Path) -> None:
    import dataclasses

    import numpy as np

    from raycon import methods
    from raycon.data_loaders.hold_out import held_out_rows
    from raycon.tuning.study import scored

    table = tmp_path / "levels.csv"
    table.write_text("row\n" + "".join(f"{i}\n" for i in range(1437)))
    base = dataclasses.replace(
        recipe("quickstart"),
        method=methods.configure("clinfonce", clusters="column", columns=("row",), table=str(table)),
    )
    cut = sweep.cut_table(scored(base, "knn/top1_k20", 0.25, 1), tmp_path, write=True)
    held = held_out_rows(1437, 0.25, base.seed)
    left = [int(line) for line in Path(cut.method.table).read_text().splitlines()[1:]]  # type: ignore[attr-defined]
    assert left == np.flatnonzero(~held).tolist()
    table.write_text("row\n1\n")
    with pytest.raises(ValueError, match="has 1 lines after the first, the data 1437 images"):
        sweep.cut_table(scored(base, "knn/top1_k20", 0.25, 1), tmp_path, write=False)


def test_help_is_quick_and_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raycon.tuning.sweep as s; status = s.main(sys.argv[1:]); "
        "assert not {'torch', 'ray', 'optuna', 'sklearn'} & set(sys.modules), 'too much imported'; sys.exit(status)"
    )
    for arguments, words in (
        (["--help"], ["--max-concurrent", "sce-temperature"]),
        ([STUDY, "--help"], ["Space:", "asha"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=os.environ,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words), done.stdout


def test_the_metric_is_told_by_the_evaluation_itself() -> None:
    study = find(STUDY)()
    assert sweep.produced("knn", study) == ["knn/top1_k20"]
    assert "linear/top1" in sweep.produced("linear", study)
    assert "retrieval/recall_at_1" in sweep.produced("retrieval", study)


def test_a_trainable_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        trainable("nothing", folder=tmp_path / "a")
    with pytest.raises(ValueError, match="no such evaluation"):
        trainable("quickstart", metric="knm/top1", folder=tmp_path / "b")
    with pytest.raises(ValueError, match="validation = 0"):
        trainable("quickstart", validation=0.0, folder=tmp_path / "c")
    assert not list(tmp_path.iterdir())
