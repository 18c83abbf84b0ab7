"""Encoders that start from weights: torchvision's by name, files, and the fresh first convolution of small stems."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from raycon.core.config import ConfigError, ModelConfig
from raycon.nn import networks

NAME = "torchvision:IMAGENET1K_V1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A cached "download" of ResNet-18 as old files are: without the BatchNorm counters."""
    torch.manual_seed(0)
    state = {k: v + 0.1 for k, v in models.resnet18().state_dict().items() if not k.endswith("num_batches_tracked")}
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: dict(state))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    return state


def test_torchvision_weights_by_name(cache: dict[str, torch.Tensor]) -> None:
    encoder = networks.build_encoder(ModelConfig(encoder="resnet18", weights=NAME), channels=3)
    own = encoder.state_dict()
    assert all(torch.equal(own[k], v) for k, v in cache.items() if not k.startswith("fc."))


def test_a_small_stem_keeps_its_fresh_convolution(cache: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(cache, tmp_path / "w.pth")
    for weights in (NAME, str(tmp_path / "w.pth")):
        encoder = networks.build_encoder(ModelConfig(encoder="resnet18", stem="small", weights=weights), channels=3)
        own = encoder.state_dict()
        assert own["conv1.weight"].shape == (64, 3, 3, 3)
        assert torch.equal(own["layer1.0.conv1.weight"], cache["layer1.0.conv1.weight"])
    with pytest.raises(ConfigError, match=r"another shape"):
        networks.build_encoder(ModelConfig(encoder="resnet18", width=32, weights=NAME), channels=3)


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"download failed \(.*no route.*resnet18-f37072fd\.pth there, or give the file"
    ):
        networks.build_encoder(ModelConfig(encoder="resnet18", weights=NAME), channels=3)
    with pytest.raises(ConfigError, match=r"resnet18 has torchvision:IMAGENET1K_V1"):
        networks.build_encoder(ModelConfig(encoder="resnet18", weights="torchvision:V9"), channels=3)
    with pytest.raises(ConfigError, match=r"no weights for model\.encoder"):
        networks.build_encoder(ModelConfig(encoder="resnet10", weights=NAME), channels=3)


def test_the_queue_keeps_labels_beside_keys() -> None:
    queue = networks.Queue(6, 2, labelled=True)
    assert queue.labels is not None
    assert queue.labels.tolist() == [-1] * 6
    for i in range(4):
        queue.enqueue(torch.full((2, 2), float(i)), torch.tensor([i, 10 + i]))
    assert queue.labels.tolist() == [3, 13, 1, 11, 2, 12]
    assert queue.keys[:, 0].tolist() == [3, 3, 1, 1, 2, 2]
    assert "labels" not in networks.Queue(6, 2).state_dict()
