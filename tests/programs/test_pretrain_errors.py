"""Wrong requests: exit status 2, one readable message with the option and the remedy, nothing created."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from raycon import pretrain
from raycon.core.config import save_yaml
from raycon.recipes import recipe


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    before = sorted(folder.rglob("*"))
    try:
        status = pretrain.main(arguments)
    except SystemExit as stop:  # tyro's own refusals
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    assert sorted(folder.rglob("*")) == before
    return " ".join(error.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nonsense"], ["no recipe 'nonsense'", "quickstart"]),
        ([], ["RECIPE", "--config", "--resume"]),
        (["quickstart", "--method.temprature", "0.1"], ["--method.temprature", "--method.temperature"]),
        (["quickstart", "--train.epochs", "many"], ["--train.epochs", "many"]),
        (["quickstart", "--train.batch", "63"], ["train.batch = 63", "multiple"]),
        (["quickstart", "--method.queue", "100"], ["method.queue = 100", "multiple of train.batch"]),
        (["quickstart", "--method.negatives", "60"], ["method.negatives = 60", "smallest k = 60"]),
        (["quickstart", "--method.clusters", "60", "5000"], ["k = 5000", "1437 images"]),
        (["quickstart", "--method.temperature", "0"], ["method.temperature = 0"]),
        (["quickstart", "--data.name", "digit"], ["data.name = 'digit'", "did you mean 'digits'"]),
        (["quickstart", "--data.views", "mocov9"], ["data.views", "mocov2"]),
        (["quickstart", "--model.encoder", "resnet1000"], ["model.encoder = 'resnet1000'"]),
        (["quickstart", "--model.weights", "/nowhere/w.pth"], ["model.weights", "no such file"]),
        (["quickstart", "--evals.names", "knn", "svn"], ["evals.names", "svn", "linear"]),
        (["quickstart", "--train.lr", "nan"], ["train.lr = nan"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--resume", "nowhere"], ["nowhere", "no such file"]),
        (["quickstart", "--config", "x.yaml"], ["give one of"]),
        (["quickstart", "--config"], ["--config", "give a value"]),
    ],
)
def test_wrong_options(
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


def test_all_problems_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--train.batch=63", "--method.temperature=-1", "--data.views=x", "--evals.names", "y", "--data.size=2"]
    error = refused(["quickstart", *options, f"--run.dir={tmp_path}/run"], capsys, tmp_path)
    for word in ("train.batch", "method.temperature", "data.views", "evals.names", "data.size"):
        assert word in error, error


def test_missing_data_names_the_three_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    options = ["fashion-mnist-pcl-cpu", f"--data.root={tmp_path}/data", f"--run.dir={tmp_path}/run"]
    error = refused(options, capsys, tmp_path)
    for word in ("dataset-fashion-mnist", "data.root", "torchvision"):
        assert word in error, error


def test_damaged_data_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"not an idx file")
    options = ["fashion-mnist-pcl-cpu", f"--data.root={tmp_path}", f"--run.dir={tmp_path}/run"]
    assert f"{tmp_path}/train-images-idx3-ubyte" in refused(options, capsys, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "cannot be written" in refused(["quickstart", f"--run.dir={closed}/run"], capsys, tmp_path)


def test_a_run_directory_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in refused(["quickstart", f"--run.dir={tmp_path}/file/run"], capsys, tmp_path)


def test_a_directory_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "--resume" in refused(["quickstart", f"--run.dir={tmp_path}/run"], capsys, tmp_path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "method: pcl\n", "{}"])
def test_files_that_are_no_configuration(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert "c.yaml" in refused(["--config", str(tmp_path / "c.yaml")], capsys, tmp_path)


def test_a_yaml_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']")
    refused(["--config", str(tmp_path / "c.yaml")], capsys, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints" / "00000011"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    save_yaml(recipe("quickstart"), tmp_path / "run" / "config.yaml")
    error = refused(["--resume", str(tmp_path / "run")], capsys, tmp_path)
    assert "no readable checkpoint" in error


def test_a_written_configuration_can_be_given_back(tmp_path: Path) -> None:
    config, _ = pretrain.parse(["quickstart", "--method.temperature", "0.33", "--method.clusters", "10", "20"])
    save_yaml(config, tmp_path / "config.yaml")
    again, _ = pretrain.parse(["--config", str(tmp_path / "config.yaml"), "--train.epochs", "3"])
    assert again == dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["method"]["clusters"] == [10, 20]


def test_no_two_runs_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    base, _ = pretrain.parse(["quickstart"])
    other, _ = pretrain.parse(["quickstart", "--method.temperature", "0.5"])
    first, second = pretrain.choose_run_dir(base), pretrain.choose_run_dir(other)
    assert "temperature=0.5" in second.name
    assert first != second
    first.mkdir(parents=True)
    assert pretrain.choose_run_dir(base) != first


def test_out_of_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def run(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pretrain, "run", run)
    assert pretrain.main(["quickstart"]) == 1
    error = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB" in error
    assert "--train.accumulate 2" in error
    assert "raycon.doctor --plan" in error
