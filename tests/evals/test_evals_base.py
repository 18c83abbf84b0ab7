"""Finding, running and keeping evaluations; extracting features."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from torch import nn

from raycon import evals
from raycon.core.config import ConfigError, EvalConfig
from raycon.core.types import Images
from raycon.evals import FeatureSets, features, knn, linear


@pytest.fixture
def sets() -> FeatureSets:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 3
    x = torch.eye(3, 8)[label] * 4 + torch.randn(120, 8, generator=generator)
    return FeatureSets(x[:90], label[:90], x[90:], label[90:])


def test_names_and_build() -> None:
    assert {"knn", "linear", "clusters"} <= set(evals.names())
    for name in evals.names():
        made = evals.build(name, EvalConfig())
        assert hasattr(made, "run") != hasattr(made, "run_on"), f"{name} is no evaluation: is it a helper?"
    with pytest.raises(ConfigError, match=r"no evaluation 'knnn'; there are .*knn"):
        evals.build("knnn", EvalConfig())


def test_names_are_listed_without_torch() -> None:
    code = "import sys; from raycon import evals; evals.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_crash_takes_no_other_down(sets: FeatureSets, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, sets: FeatureSets) -> dict[str, float]:
        raise MemoryError("no room")

    monkeypatch.setattr(knn.Evaluation, "run", broken)
    outcome = evals.run_all(("knn", "linear"), EvalConfig(linear_epochs=5), sets)
    assert outcome.results["knn/failed"] == 1.0
    assert outcome.failed == {"knn": "MemoryError: no room"}
    assert outcome.results["linear/top1"] > 80
    assert set(outcome.seconds) == {"knn", "linear"}


def test_tasks_name_a_protocol_and_a_data_set() -> None:
    found = evals.parse(["knn", "linear:pcl@cifar10", "knn", "transfer@all"])
    assert found[:2] == [evals.Task("knn"), evals.Task("linear", "pcl", "cifar10")]
    assert [t.name for t in found[:3]] == ["knn", "linear:pcl@cifar10", "transfer@food101"]
    assert len(found) == 2 + 11
    with pytest.raises(ConfigError, match=r"(?s)'linear:pcx'.*'kn'"):
        evals.parse(["linear:pcx", "kn@cifar10"])


def test_a_crash_is_tried_again_a_wrong_request_is_not(sets: FeatureSets, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flaky(self: object, sets: FeatureSets) -> dict[str, float]:
        calls.append(1)
        if len(calls) < 3:
            raise MemoryError("no room")
        return {"knn/top1_k1": 5.0}

    monkeypatch.setattr(knn.Evaluation, "run", flaky)
    assert evals.run_all(("knn@cifar10",), EvalConfig(retries=2), sets).results == {"knn@cifar10/top1_k1": 5.0}
    calls.clear()
    assert evals.run_all(("knn",), EvalConfig(retries=1), sets).failed == {"knn": "MemoryError: no room"}
    assert len(calls) == 2

    def wrong(self: object, sets: FeatureSets) -> dict[str, float]:
        calls.append(1)
        raise ValueError("give a smaller k")

    monkeypatch.setattr(knn.Evaluation, "run", wrong)
    calls.clear()
    assert evals.run_all(("knn",), EvalConfig(retries=5), sets).failed == {"knn": "ValueError: give a smaller k"}
    assert len(calls) == 1


def test_a_number_that_is_not_finite_is_a_failure(sets: FeatureSets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.Evaluation, "run", lambda self, sets: {"linear/top1": math.nan})
    outcome = evals.run_all(("linear",), EvalConfig(), sets)
    assert outcome.results == {"linear/failed": 1.0}
    assert "linear/top1" in outcome.failed["linear"]


def test_bad_features_are_said(sets: FeatureSets) -> None:
    sets.test[4, 2] = math.inf
    with pytest.raises(ValueError, match="test features are not finite, the first of them at row 4"):
        evals.run_all(("knn",), EvalConfig(), sets)
    with pytest.raises(ValueError, match="label -1"):
        evals.check(sets._replace(test=sets.train, test_label=torch.full((90,), -1)))


def entry(step: int, results: dict[str, float], **more: object) -> dict[str, object]:
    return {"step": step, "epoch": step // 10, "checkpoint": str(step), "results": results, "seconds": {}, **more}


def test_append_results(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.json"
    evals.append_results(file, entry(20, {"knn/top1_k1": 50.0, "knn/top1_k9": 55.0}))
    evals.append_results(file, entry(10, {"knn/top1_k1": 40.0}))
    evals.append_results(file, entry(20, {"linear/top1": 60.0}))
    evals.append_results(file, entry(20, {"knn/top1_k1": 51.0}))  # replaces all of knn, nothing of linear
    evals.append_results(file, entry(0, {"knn/top1_k1": 30.0}, control="pixels"))
    found = json.loads(file.read_text())
    assert [(e["step"], e.get("control")) for e in found] == [(0, "pixels"), (10, None), (20, None)]
    assert found[2]["results"] == {"linear/top1": 60.0, "knn/top1_k1": 51.0}
    assert found == evals.read_results(file)


def test_append_results_success_clears_the_failure(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.json"
    evals.append_results(file, entry(20, {"knn/failed": 1.0}, failed={"knn": "MemoryError"}))
    evals.append_results(file, entry(20, {"knn/top1_k1": 51.0}))
    assert evals.read_results(file)[0]["failed"] == {}
    assert evals.read_results(file)[0]["results"] == {"knn/top1_k1": 51.0}


def test_append_results_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"evaluations.json is not a list"):
        evals.append_results(file, entry(1, {}))
    file.write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        evals.append_results(file, entry(1, {}))
    assert file.read_text() == "["


def _append_many(file: Path, first: int, start: Barrier) -> None:
    start.wait(60)
    for step in range(first, first + 25):
        evals.append_results(file, entry(step, {"knn/top1_k1": 1.0}))


def test_append_results_from_several_processes(tmp_path: Path) -> None:
    file, fork = tmp_path / "evaluations.json", multiprocessing.get_context("fork")
    start = fork.Barrier(4)
    workers = [fork.Process(target=_append_many, args=(file, 25 * i, start)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [e["step"] for e in evals.read_results(file)] == list(range(100))


def test_extract_by_row_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    net[1].eval()  # a frozen part stays frozen
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.randn(11, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    shuffled = [Images(images[rows], rows) for rows in torch.randperm(11).split(4)]
    found = features.extract(net, shuffled, 11)
    assert net.training
    assert net[2].training
    assert not net[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.allclose(found, net.eval()(images).detach(), atol=1e-6)
    assert not found.requires_grad
    assert not found.is_inference()


def test_extract_wants_each_row_once() -> None:
    images = torch.zeros(5, 1, 2, 2)
    with pytest.raises(ValueError, match=r"1 of 6 rows did not come exactly once, the first is row 5 \(0 times\)"):
        features.extract(features.pixels, features.blocks(images, 2), 6)
    twice = [*features.blocks(images), Images(images[:1], torch.tensor([3]))]
    with pytest.raises(ValueError, match=r"row 3 \(2 times\)"):
        features.extract(features.pixels, twice, 5)
    with pytest.raises(ValueError, match="rows"):
        features.extract(features.pixels, features.blocks(images), 4)


def test_extract_sets_without_test_split_share_train() -> None:
    images = torch.rand(5, 1, 2, 2)
    found = features.extract_sets(features.pixels, features.blocks(images, 2), torch.arange(5))
    assert found.test is found.train
    assert torch.equal(found.train, images.flatten(1))


def test_pixels_undo_the_normalisation() -> None:
    raw = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = (0.2, 0.6), (0.5, 0.25)
    normal = (raw - torch.tensor(mean).view(1, 2, 1, 1)) / torch.tensor(std).view(1, 2, 1, 1)
    assert torch.allclose(features.pixels(normal, mean, std), raw.flatten(1), atol=1e-6)
