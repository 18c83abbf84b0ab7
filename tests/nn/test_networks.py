from __future__ import annotations

import pytest
import torch
from torchvision import models

from raycon.core.config import ConfigError, ModelConfig, TrainConfig
from raycon.nn import networks, optim


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_published_width_is_torchvision_s_network(name: str) -> None:
    torch.manual_seed(0)
    ours = networks.build_encoder(ModelConfig(encoder=name), channels=3).eval()
    theirs = models.get_model(name).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    assert ours.features == theirs(images).shape[1]


@pytest.mark.parametrize("stem", ["small", "small-stride2", "imagenet"])
def test_narrow_networks_have_the_width_they_say(stem: str) -> None:
    encoder = networks.build_encoder(ModelConfig(encoder="resnet10", width=8, stem=stem), channels=1)  # type: ignore[arg-type]
    assert encoder(torch.randn(3, 1, 32, 32)).shape == (3, encoder.features) == (3, 64)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnext50_32x4d"])
def test_other_torchvision_networks_lose_their_classifier(name: str) -> None:
    encoder = networks.build_encoder(ModelConfig(encoder=name), channels=3).eval()
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, encoder.features)


@pytest.mark.parametrize(
    ("config", "channels", "word"),
    [
        (ModelConfig(encoder="resnet5000"), 3, "model.encoder"),
        (ModelConfig(encoder="mobilenet_v3_small", width=32), 3, "model.width"),
        (ModelConfig(encoder="mobilenet_v3_small", stem="small"), 3, "model.stem"),
        (ModelConfig(encoder="mobilenet_v3_small"), 1, "channels"),
    ],
)
def test_impossible_networks_are_refused(config: ModelConfig, channels: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        networks.build_encoder(config, channels)


def test_queue_holds_the_last_keys_in_order() -> None:
    queue = networks.Queue(6, 2)
    blocks = [torch.full((2, 2), float(i)) for i in range(5)]
    for block in blocks:
        queue.enqueue(block)
    assert queue.keys[:, 0].tolist() == [3, 3, 4, 4, 2, 2]
    assert int(queue.pointer) == 4


def test_teacher_follows_and_learns_nothing_by_itself() -> None:
    student = torch.nn.Linear(3, 3)
    teacher = networks.Twin(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        student.weight.add_(1.0)
    before = teacher.net.weight.clone()
    teacher.follow(student, 0.75)
    torch.testing.assert_close(teacher.net.weight, 0.75 * before + 0.25 * student.weight.detach())


def test_groups_are_by_module_type_not_by_name() -> None:
    encoder = networks.build_encoder(ModelConfig(encoder="resnet18", width=8), channels=3)
    decayed, bare = optim.parameter_groups(encoder, TrainConfig(decay="no-bias-bn", weight_decay=0.1))
    names = {id(p): n for n, p in encoder.named_parameters()}
    assert all("conv" in names[id(p)] or "downsample.0" in names[id(p)] for p in decayed["params"])
    assert any("downsample.1" in names[id(p)] for p in bare["params"])  # a BatchNorm that its name does not tell
    assert bare["weight_decay"] == 0
    assert len(decayed["params"]) + len(bare["params"]) == len(list(encoder.parameters()))


def test_cosine_warms_up_and_ends_at_zero() -> None:
    train = TrainConfig(lr=2.0, epochs=10, schedule="cosine", warmup_epochs=2)
    rates = [optim.lr_at(train, s, 5) for s in range(50)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(2.0)
    assert rates[5] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[30] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize(("scaling", "expected"), [("none", 0.1), ("linear", 0.2), ("sqrt", 0.1 * 512**0.5)])
def test_lr_scaling(scaling: str, expected: float) -> None:
    assert optim.base_lr(TrainConfig(lr=0.1, batch=512, lr_scaling=scaling)) == pytest.approx(expected)  # type: ignore[arg-type]
