"""python -m raycon.evaluate: on a run, on files of weights, wrong requests, and on Ray."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raycon import evals, evaluate, pretrain
from raycon.core.config import EvalConfig
from raycon.evals import knn, on_checkpoint, retrieval
from raycon.nn import networks


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["quickstart", "--runtime", "local", "--train.epochs", "2", "--train.warmup-epochs", "0", "--model.width"]
    options += [
        "4",
        "--method.warmup-epochs",
        "1",
        "--evals.names",
        "--data.loader",
        "torch",
        "--mining.redo",
        "1",
        "--checkpoint.every-epochs",
        "1",
    ]
    assert pretrain.main([*options, f"--run.dir={folder}", "--log.quiet", "--log.report=light"]) == 0
    return folder


def entries(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder / "evaluations.json").read_text())


@pytest.mark.slow
def test_a_run_its_checkpoints_and_controls(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run_dir), "knn", "clusters", "--runtime", "local", "--evals.knn-k", "1", "5"]
    assert evaluate.main([*arguments, "--every", "--controls"]) == 0
    found = entries(run_dir)
    assert [e.get("control") for e in found] == ["pixels", "untrained", None, None]
    first, last = found[2:]
    assert first["step"] < last["step"]
    assert {"knn/top1_k1", "knn/top1_k5", "clusters/ami", "clusters/snapshot0_ami"} <= set(last["results"])
    text = capsys.readouterr().out
    assert "knn/top1_k5" in text
    assert "evaluations.json" in text
    # The same number as by hand.
    subject = on_checkpoint.of_run(run_dir, run_dir / "checkpoints" / "last")
    source = on_checkpoint.open_source(subject, "digits", [], torch.device("cpu"))
    assert source.train is None, "no task, no data"
    source = on_checkpoint.open_source(subject, "digits", evals.parse(["knn"]), torch.device("cpu"))
    sets = on_checkpoint.sets_of(subject, source, "digits", on_checkpoint.extract(source, False))
    by_hand = knn.Evaluation(EvalConfig(knn_k=(1, 5))).run(sets)
    assert last["results"]["knn/top1_k5"] == by_hand["knn/top1_k5"]
    pixels = found[0]["results"]["knn/top1_k1"]
    assert pixels > 90, "raw digits are easy for a nearest neighbour"


@pytest.mark.slow
def test_evaluations_of_one_entry_add_up_and_failures_stay_alone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, sets: object) -> dict[str, float]:
        raise MemoryError("no room")

    arguments = [str(run_dir / "checkpoints" / "last"), "retrieval", "lowshot", "--runtime", "local"]
    monkeypatch.setattr(retrieval.Evaluation, "run", broken)
    assert evaluate.main(arguments) == 1
    (entry,) = [e for e in entries(run_dir) if e["checkpoint"] == "00000022" and "control" not in e]
    assert entry["failed"] == {"retrieval": "MemoryError: no room"}
    assert "lowshot/top1_k1" in entry["results"]
    assert "retrieval failed: MemoryError: no room" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_of_weights(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raycon.core.config import ModelConfig

    torch.manual_seed(0)
    net = networks.build_encoder(ModelConfig(encoder="resnet18", width=8), 1)
    file = tmp_path / "net.pth"
    torch.save(net.state_dict(), file)
    assert evaluate.main([str(file), "knn", "--runtime", "local"]) == 2
    assert "--data.name" in capsys.readouterr().err
    arguments = [str(file), "knn", "--runtime", "local", "--data.name", "digits", "--data.size", "16"]
    assert evaluate.main([*arguments, "--evals.knn-k", "1"]) == 0
    (entry,) = json.loads((tmp_path / "net.pth.evaluations.json").read_text())
    assert list(entry["results"]) == ["knn@digits/top1_k1"]
    assert entry["results"]["knn@digits/top1_k1"] > 30


@pytest.mark.ranks
def test_under_torchrun_the_ranks_train_together_and_one_keeps(tmp_path: Path) -> None:
    """Detection on two ranks, the kNN on one of them; the numbers are told and kept once."""
    pytest.importorskip("pycocotools")
    from raycon.core.config import ModelConfig
    from tests.evals.test_detection import shapes

    shapes(tmp_path / "coco", "train", 6, 0)
    shapes(tmp_path / "coco", "val", 3, 1)
    torch.manual_seed(0)
    net = networks.build_encoder(ModelConfig(encoder="resnet10", width=4), 1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    program = [sys.executable, "-m", "raycon.evaluate", str(tmp_path / "net.pth"), "knn@digits", "detection:tiny"]
    program += ["--runtime", "local", "--data.size", "8", "--evals.coco", str(tmp_path / "coco")]
    program += ["--evals.iterations", "2", "--evals.knn-k", "1"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([*ranks, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "net.pth.evaluations.json").read_text())
    assert {"knn@digits/top1_k1", "detection:tiny/box_ap", "detection:tiny/mask_ap50"} <= set(entry["results"])
    assert entry["failed"] == {}
    assert done.stdout.count("detection:tiny/box_ap ") == done.stdout.count("kept in") == 1


@pytest.mark.slow
def test_another_data_set_is_named(run_dir: Path, tmp_path: Path) -> None:
    subject = on_checkpoint.of_run(run_dir, run_dir / "checkpoints" / "last")
    groups = on_checkpoint.plan(subject, evals.parse(["knn", "linear", "knn@fashion-mnist", "transfer", "linear:pcl"]))
    assert {k: [t.name for t in v] for k, v in groups.items()} == {
        ("digits", False): ["knn", "linear", "linear:pcl"],
        ("fashion-mnist", False): ["knn@fashion-mnist"],
        ("digits", True): ["transfer"],
    }


@pytest.mark.slow
def test_wrong_requests_are_one_message(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], ["give a CHECKPOINT"]),
        (["/no/such"], ["/no/such: no such"]),
        ([str(run_dir), "knm", "linear:pcx", "--evals.shots", "0", "--threads", "0"],
         ["'knm'", "'linear:pcx'", "evals.shots has 0", "threads = 0"]),
        ([str(run_dir), "knn@digitz", "detection"], ["knn@digitz", "did you mean 'digits'", "--evals.coco"]),
        ([str(tmp_path), "knn"], ["neither a run"]),
    ):  # fmt: skip
        assert evaluate.main([*arguments, "--runtime", "local"] if arguments else []) == 2
        text = capsys.readouterr().err
        assert all(word in text for word in words), text
        assert "Traceback" not in text


def test_help_needs_no_torch() -> None:
    code = "import sys; from raycon import evaluate\ntry: evaluate.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(3 if 'torch' in sys.modules or 'ray' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "linear:pcl" in done.stdout
    assert "--evals.knn-k" in done.stdout


@pytest.mark.ray
def test_the_same_numbers_on_ray_and_a_crash_stays_alone(run_dir: Path, tmp_path: Path) -> None:
    import ray

    from raycon.on_ray import evaluate as on_ray
    from raycon.on_ray import here

    subject = on_checkpoint.of_run(run_dir, run_dir / "checkpoints" / "last")
    short = dataclasses.replace(subject.config.evals, epochs=2)
    subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, evals=short))
    tasks = evals.parse(["knn", "lowshot", "linear:pcl", "detection"])  # detection has no data: it fails, alone
    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="raycon")
    try:
        ended: list[str] = []
        far = on_ray.run(subject, tasks, shards=2, done=lambda task, outcome: ended.append(task.name))
        assert on_ray.placement_problems(EvalConfig(gpus=1.0))
        assert on_ray.placement_problems(EvalConfig(cpus=1.0)) == []
    finally:
        ray.shutdown()
    here = on_checkpoint.run_here(subject, tasks, torch.device("cpu"))
    assert far.results == pytest.approx(here.results, abs=0.6)
    assert far.results["knn/top1_k1"] == here.results["knn/top1_k1"]
    assert set(far.failed) == set(here.failed) == {"detection"}
    assert sorted(ended) == sorted(t.name for t in tasks)
