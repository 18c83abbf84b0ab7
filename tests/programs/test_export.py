"""Exports read back by the library they are for: the same features, and a card that says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycon import export
from raycon.core.config import ModelConfig, RunConfig, save_yaml
from raycon.nn import networks, optim
from raycon.recipes import recipe
from raycon.training import checkpoint, job, publish
from raycon.training.interop import load_encoder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the quickstart as it stands after its initialisation, with an evaluation."""
    import dataclasses

    folder = tmp_path_factory.mktemp("runs") / "digits-run"
    config = recipe("quickstart")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir="/home/someone/secret"))
    folder.mkdir()
    save_yaml(config, folder / "config.yaml")
    dataset = job.open_data(config)
    method = job.build_method(config, job.facts_of(config, dataset, 1), 1)
    statistics(method)
    state = {"step": 110, "epoch": 10, "steps": 1100, "per_epoch": 11, "method": "pcl", "seed": 0, "world": 1}
    checkpoint.save(folder / "checkpoints", method, optim.build_optimizer(method, config.train), None,
                    state | {"evaluate": True})  # fmt: skip
    entries = [
        {"step": 0, "control": "pixels", "results": {"knn/top1": 1.0}},
        {"step": 99, "results": {"knn/top1": 2.0}},
    ]
    entries.append({"step": 110, "results": {"knn/top1": 97.5, "linear/top1": 96.25}})
    (folder / "evaluations.json").write_text(json.dumps(entries))
    return folder


def statistics(net: nn.Module) -> None:
    """BatchNorm statistics that tell a right file from a wrong one."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]


def weights(
    folder: Path, encoder: str = "resnet18", stem: str = "imagenet", channels: int = 3, width: int = 64
) -> Path:
    """A weight file of a random network of raycon's."""
    torch.manual_seed(0)
    net = networks.build_encoder(ModelConfig(encoder=encoder, stem=stem, width=width), channels)  # type: ignore[arg-type]
    statistics(net)
    torch.save(publish.library_state(net), folder / f"{encoder.replace(':', '-')}.pth")
    return folder / f"{encoder.replace(':', '-')}.pth"


def run(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert export.main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def same(one: Any, two: Any, channels: int, size: int = 32) -> None:
    images = torch.randn(3, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(one(images), two(images), rtol=1e-4, atol=1e-4)


def by_snippet(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the Python that the program printed, where the file lies."""
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    exec(text.split("\n\n", 1)[1], namespace)
    return namespace["encoder"]


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "stem", "channels"),
    [
        ("shufflenet_v2_x0_5", "imagenet", 3),
        ("resnet10", "small-stride2", 1),
        pytest.param("resnet18", "imagenet", 3, marks=pytest.mark.slow),
        pytest.param("resnet18", "small", 1, marks=pytest.mark.slow),
        pytest.param("resnet10", "imagenet", 1, marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", "imagenet", 3, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_torchvision(
    tmp_path: Path, encoder: str, stem: str, channels: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weights(tmp_path, encoder, stem, channels)
    name = ["--encoder", encoder] if encoder.startswith("shuffle") else []
    told = run([file, "--format", "torchvision", "--out", tmp_path / "out" / "e.pth", "--stem", stem, *name], capsys)
    theirs = by_snippet(told, tmp_path / "out", monkeypatch)
    assert type(theirs).__module__.startswith("torchvision.")
    ours, about = load_encoder(tmp_path / "out" / "e.pth")  # the card beside it says network and stem
    assert (about.model.encoder, about.model.stem, about.channels) == (encoder, stem, channels)
    same(theirs, ours, channels)
    same(theirs, load_encoder(file, encoder=name[1] if name else "", stem=stem)[0], channels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "stem", "channels"),
    [("resnet18", "imagenet", 3), ("resnet18", "small", 1), ("resnet10", "imagenet", 1), ("timm:mobilenetv3_small_050", "imagenet", 3)],
)  # fmt: skip
def test_timm(
    tmp_path: Path, encoder: str, stem: str, channels: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    file = weights(tmp_path, encoder, stem, channels)
    name = ["--encoder", encoder] if encoder.startswith("timm") else []
    told = run([file, "--format", "timm", "--out", tmp_path / "t.pth", "--stem", stem, *name], capsys)
    theirs = by_snippet(told, tmp_path, monkeypatch)
    assert type(theirs).__module__.startswith("timm.")
    same(theirs, load_encoder(file, encoder=name[1] if name else "", stem=stem)[0], channels)


def test_safetensors_of_a_run(run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run([run_dir, "--out", tmp_path / "e.safetensors"], capsys)
    assert "resnet10, width 16, stem small, 1 channels, 128 features" in told
    (tmp_path / "e.json").rename(tmp_path / "elsewhere.json")  # the header alone is enough
    ours, about = load_encoder(tmp_path / "e.safetensors")
    same(ours, load_encoder(run_dir / "checkpoints" / "last")[0], 1)
    same(ours, by_snippet(told, tmp_path, monkeypatch), 1)
    assert about.config is not None
    assert (about.config.method.name, about.config.train.batch) == ("pcl", 128)
    card = json.loads((tmp_path / "elsewhere.json").read_text())
    assert (card["method"], card["data"], card["epochs"], card["step"]) == ("pcl", "digits", 10, 110)
    assert card["evaluations"] == {"knn/top1": 97.5, "linear/top1": 96.25}
    assert card["encoder"] == {"name": "resnet10", "width": 16, "stem": "small", "channels": 1, "features": 128}
    how = card["preprocessing"]
    assert (how["size"], how["resize"], len(how["mean"]), len(how["std"])) == (16, 16, 1, 1)
    assert card["config"]["method"]["clusters"] == [60, 120, 240]
    assert "secret" not in json.dumps(card)


def test_hugging_face_folder_of_a_run(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    run([run_dir, "--format", "hf", "--out", tmp_path / "hub"], capsys)
    assert sorted(f.name for f in (tmp_path / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    same(load_encoder(tmp_path / "hub")[0], load_encoder(run_dir)[0], 1)
    readme = (tmp_path / "hub" / "README.md").read_text()
    assert readme.startswith("---\ntags:\n  - raycon\n")
    for words in ("| knn/top1 | 97.5 |", "| Pretrained with | pcl |", 'load_encoder("FOLDER")'):
        assert words in readme
    assert "architecture" not in json.loads((tmp_path / "hub" / "config.json").read_text())  # timm has no such network


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 1])
def test_timm_reads_the_folder_of_a_standard_network(tmp_path: Path, channels: int, capsys: Any) -> None:
    timm = pytest.importorskip("timm")
    file = weights(tmp_path, channels=channels)
    run([file, "--format", "hf", "--out", tmp_path / "hub"], capsys)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    ours, about = load_encoder(tmp_path / "hub")
    assert about.channels == channels
    same(theirs, ours, channels)
    same(theirs, load_encoder(file)[0], channels)


def test_torchscript(run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run([run_dir, "--format", "torchscript", "--out", tmp_path / "e.pt"], capsys)
    same(by_snippet(told, tmp_path, monkeypatch), load_encoder(run_dir)[0], 1, size=16)
    extra = {"card.json": ""}
    torch.jit.load(str(tmp_path / "e.pt"), _extra_files=extra)
    assert json.loads(extra["card.json"])["method"] == "pcl"


@pytest.mark.slow
def test_torch_export(run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = run([run_dir, "--format", "torch-export", "--out", tmp_path / "e.pt2"], capsys)
    same(by_snippet(told, tmp_path, monkeypatch), load_encoder(run_dir)[0], 1, size=16)


@pytest.mark.slow
def test_onnx(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run([run_dir, "--format", "onnx", "--out", tmp_path / "e.onnx"], capsys)
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    same(features, load_encoder(run_dir)[0], 1, size=16)
    assert json.loads(session.get_modelmeta().custom_metadata_map["encoder"])["name"] == "resnet10"


def test_an_export_with_other_numbers_is_not_kept(
    run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: lambda x: load_encoder(run_dir)[0](x) * 1.01)
    assert export.main([str(run_dir), "--format", "torchscript", "--out", str(tmp_path / "e.pt")]) == 1
    assert "features differ from the encoder's" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- requests ---------------------------------------------------------------------------------------------------


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = export.main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own refusals
        status = int(stop.code or 0)
    error = capsys.readouterr().err
    assert status == 2, error
    return error


def test_wrong_requests(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "broken.pth").write_text("no weights")
    small = weights(tmp_path, "resnet18", "small", 1, width=8)
    cases: list[tuple[list[object], str]] = [
        ([run_dir, "--format", "tensorflow"], "invalid choice: 'tensorflow'"),
        ([tmp_path / "nowhere"], "nowhere: no such file"),
        ([tmp_path / "broken.pth"], "broken.pth: damaged, or no weight file"),
        ([tmp_path / "mine"], "neither a run, nor a checkpoint"),
        ([run_dir, "--out", tmp_path / "there.safetensors"], "exists: give another name, or --overwrite"),
        ([run_dir, "--format", "hf", "--out", tmp_path / "mine", "--overwrite"], "did not write"),
        ([run_dir, "--format", "torchvision"], "no resnet10 of width 16"),
        ([small, "--format", "timm"], "no resnet18 of width 8"),
        ([small, "--encoder", "resnet50"], "encoder = 'resnet50', but the tensors are of a resnet18"),
        ([run_dir, "--push", "me/it"], "--push is for --format hf"),
        ([run_dir, "--formt", "hf"], "unknown option '--formt'"),
        ([small, "--format", "run"], "--recipe: say how to go on"),
        ([small, "--format", "run", "--recipe", "quickstart", "--out", tmp_path / "r"], "an encoder only, no heads"),
    ]  # fmt: skip
    for arguments, words in cases:
        assert words in refused(arguments, capsys), arguments
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert not (tmp_path / "r").exists()


def test_overwrite(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    for kind, name in (("safetensors", "e.safetensors"), ("hf", "hub")):
        run([run_dir, "--format", kind, "--out", tmp_path / name], capsys)
        run([run_dir, "--format", kind, "--out", tmp_path / name, "--overwrite"], capsys)
        same(load_encoder(tmp_path / name)[0], load_encoder(run_dir)[0], 1)
    assert not [f for f in tmp_path.iterdir() if "part" in f.name]


def test_pushing_names_what_failed(run_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub can be reached here: the folder is written, the request refused with the cause."""
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "ENDPOINT", "http://127.0.0.1:9")
    error = refused([run_dir, "--format", "hf", "--out", tmp_path / "hub", "--push", "me/it"], capsys)
    assert "--push me/it: " in error
    assert "is complete, push again later" in error
    assert (tmp_path / "hub" / "model.safetensors").is_file()


def test_a_run_of_a_papers_file(tmp_path: Path, capsys: Any) -> None:
    """The whole way on the command line; the tensors are checked in test_interop_import.py."""
    config: RunConfig = recipe("quickstart")
    encoder = networks.build_encoder(ModelConfig(encoder="resnet18", width=4, stem="small"), 1).state_dict()
    fc = {"fc.weight": torch.randn(8, 32), "fc.bias": torch.randn(8)}
    both = {f"module.encoder_{n}.{k}": v for n in "qk" for k, v in (encoder | fc).items()}
    both |= {"module.queue": torch.randn(8, 256), "module.queue_ptr": torch.tensor([0])}
    torch.save({"epoch": 12, "arch": "resnet18", "state_dict": both}, tmp_path / "pcl.pth.tar")
    told = run([tmp_path / "pcl.pth.tar", "--format", "run", "--recipe", "quickstart", "--out", tmp_path / "run",
                "--train.epochs", "30"], capsys)  # fmt: skip
    assert "method.head = linear (the file's)" in told
    assert f"{12 * (1437 // config.train.batch)} steps are behind it" in told
    assert "no optimiser state" in told
    assert "train:\n  epochs: 30" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_formats_are_those_that_can_be_written() -> None:
    assert list(export.FORMATS) == [*publish.SUFFIXES, "run"]


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom raycon import export\n"
        "try:\n    export.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'ray', 'tyro'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch-export" in done.stdout
