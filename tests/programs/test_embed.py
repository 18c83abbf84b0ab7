"""``raycon.embed``: the features of a plain forward pass for every row, whatever the parts, the format, the runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from raycon import embed
from raycon.core.config import ModelConfig
from raycon.data_loaders.datasets import open_dataset
from raycon.nn import networks
from raycon.training import embedding


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for grey images, with a card that says how its images are prepared."""
    torch.manual_seed(0)
    net = networks.build_encoder(ModelConfig(encoder="resnet10", width=4, stem="small"), channels=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    file = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(net.state_dict(), file)
    card = {"raycon": "0", "encoder": {"name": "resnet10", "width": 4, "stem": "small", "channels": 1, "features": 32}}
    card["preprocessing"] = {"size": 8, "mean": [0.25], "std": [0.5]}  # type: ignore[dict-item]
    file.with_suffix(".json").write_text(json.dumps(card))
    return file


def expected(encoder: Path, split: str) -> NDArray[np.float32]:
    """(N, 32): the digits as they lie in scikit-learn's array, through the network."""
    net = networks.build_encoder(ModelConfig(encoder="resnet10", width=4, stem="small"), channels=1).eval()
    net.load_state_dict(torch.load(encoder, weights_only=True))
    dataset: Any = open_dataset("digits", None, split)
    images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        found: NDArray[np.float32] = net((images - 0.25) / 0.5).numpy()
    return found


def run(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    status = embed.main([str(a) for a in arguments])
    told = capsys.readouterr()
    assert status == 0, told.err
    return told.out


def check_parquet(folder: Path, features: NDArray[np.float32], split: str) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder)  # as any reader of Parquet folders sees it
    dataset = open_dataset("digits", None, split)
    assert table["row"].to_pylist() == list(range(len(features)))
    assert table["label"].to_pylist() == dataset.label.tolist()
    assert table["weak"].to_pylist() == dataset.weak.tolist()
    assert table["path"][3].as_py() == dataset.where(3)
    stored = table["feature"].combine_chunks()
    np.testing.assert_allclose(stored.flatten().to_numpy().reshape(len(features), -1), features, rtol=1e-4, atol=1e-5)


def test_parquet_and_npy(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    features = expected(encoder, "test")
    told = run([encoder, "digits", "--split", "test", "--part", "100", "--out", tmp_path / "p"], capsys)
    assert "360 rows of 32 features, as parquet" in told
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == [
        "_manifest.json",
        *(f"part-0000{i}.parquet" for i in range(4)),
    ]
    check_parquet(tmp_path / "p", features, "test")
    run([encoder, "digits", "--split", "test", "--part", "100", "--format", "npy", "--out", tmp_path / "n"], capsys)
    names = ["_manifest.json", "features.npy", "labels.npy", "paths.npy", "rows.npy", "weak.npy"]
    assert sorted(f.name for f in (tmp_path / "n").iterdir()) == names
    arrays = {name[:-4]: np.load(tmp_path / "n" / name) for name in names if name.endswith("npy")}
    np.testing.assert_allclose(arrays["features"], features, rtol=1e-4, atol=1e-5)
    dataset = open_dataset("digits", None, "test")
    assert (arrays["labels"] == dataset.label).all()
    assert (arrays["rows"] == np.arange(360)).all()
    assert arrays["paths"][7].decode() == dataset.where(7)
    manifest = json.loads((tmp_path / "n" / "_manifest.json").read_text())
    assert (manifest["complete"], manifest["rows"], manifest["features"]) == (True, 360, 32)


def test_it_goes_on_where_it_was(encoder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third part, and a part damaged meanwhile: only what is missing is made again."""
    parts: list[int] = []
    real = embedding.embed_part

    def failing(work: embedding.Work, part: int) -> Any:
        if part == 2 and not parts.count(2):
            parts.append(part)
            raise ValueError("image.png: not a readable image")
        parts.append(part)
        return real(work, part)

    monkeypatch.setattr(embedding, "embed_part", failing)
    command = [str(a) for a in (encoder, "digits", "--split", "test", "--part", 72, "--out", tmp_path / "o")]
    for kind, name in (("parquet", "part-00000.parquet"), ("npy", "features-00000.npy")):
        parts.clear()
        folder = tmp_path / kind
        command[-1] = str(folder)
        assert embed.main([*command, "--format", kind]) == 1
        error = capsys.readouterr().err
        assert "image.png: not a readable image" in error
        assert "the same command goes on" in error
        assert not json.loads((folder / "_manifest.json").read_text())["complete"]
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        assert f"360 rows (72 of them from before) of 32 features, as {kind}" in run(
            [*command, "--format", kind], capsys
        )
        assert parts == [0, 1, 2, 0, 2, 3, 4]
        assert "complete already" in run([*command, "--format", kind], capsys)
        assert len(parts) == 7
        assert not [f for f in folder.iterdir() if f.name.startswith(".")]
    check_parquet(tmp_path / "parquet", expected(encoder, "test"), "test")
    np.testing.assert_allclose(
        np.load(tmp_path / "npy" / "features.npy"), expected(encoder, "test"), rtol=1e-4, atol=1e-5
    )


def test_a_folder_of_another_embedding_is_left_alone(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    run([encoder, "digits", "--split", "test", "--out", tmp_path / "o", "--format", "npy"], capsys)
    before = (tmp_path / "o" / "features.npy").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    cases = {
        ("--data.size", "16"): "size 8, now 16",
        ("--split", "train"): "rows 360, now 1437",
        ("--half",): "half False, now True",
        ("--format", "parquet"): "format 'npy', now 'parquet'",
        ("--out", str(tmp_path / "mine")): "exists and is no embedding",
    }
    for changed, words in cases.items():
        arguments = [encoder, "digits", "--split", "test", "--out", tmp_path / "o", "--format", "npy", *changed]
        assert embed.main([str(a) for a in arguments]) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "o" / "features.npy").read_bytes() == before
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_folder_of_images(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colour images of several sizes, named by their files; half precision; the run's encoder says nothing of mean."""
    torch.manual_seed(0)
    net = networks.build_encoder(ModelConfig(encoder="resnet10", width=4, stem="small"), channels=3)
    torch.save(net.state_dict(), tmp_path / "rgb.pth")
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"é{i}.png")
    monkeypatch.chdir(tmp_path)
    run(["rgb.pth", "photos", "--data.size", "16", "--half", "--part", "4"], capsys)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "embeddings" / "rgb-image-folder-train")
    assert table["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert table["path"][4].as_py() == str(tmp_path / "photos" / "dog" / "é1.png")
    assert str(table["feature"].type) == "fixed_size_list<element: halffloat>[32]"
    (tmp_path / "photos" / "dog" / "é1.png").write_bytes(b"broken")
    assert embed.main(["rgb.pth", "photos", "--data.size", "16", "--out", "again"]) == 1
    assert "é1.png: not a readable image" in capsys.readouterr().err


@pytest.mark.ray
def test_tasks_of_a_cluster_make_the_same(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    import ray

    from raycon.on_ray import here

    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        command = [encoder, "digits", "--split", "test", "--part", "50", "--runtime", "ray", "--out", tmp_path / "o"]
        assert embed.main([*map(str, command), "--gpus", "3"]) == 2
        assert "gpus = 3 can never be placed" in capsys.readouterr().err
        run([*command, "--workers", "2"], capsys)
    finally:
        ray.shutdown()
    check_parquet(tmp_path / "o", expected(encoder, "test"), "test")


def test_wrong_requests(encoder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases: list[tuple[list[object], str]] = [
        ([encoder], "give CHECKPOINT and DATASET (got 1)"),
        (["nowhere.pth", "digits"], "nowhere.pth: no such run, checkpoint or file"),
        ([encoder, "digit"], "did you mean 'digits'"),
        ([encoder, "digits", "--split", "dev"], "has no split 'dev'"),
        ([encoder, "digits", "--part", "0"], "part = 0: give 1 or more"),
        ([encoder, "digits", "--workers", "0"], "workers = 0: give 1 or more"),
    ]
    for arguments, words in cases:
        assert embed.main([str(a) for a in arguments]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\nfrom raycon import embed\n"
        "try:\n    embed.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--part" in done.stdout
