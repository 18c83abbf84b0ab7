"""LARS, and which parameters every rule exempts. (The numbers of whole steps: tests/golden.)"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from raycon.core.config import ModelConfig, TrainConfig
from raycon.nn import networks, optim
from raycon.training import checkpoint


def lars(module: nn.Module) -> torch.optim.Optimizer:
    train = TrainConfig(optimizer="lars", decay="no-bias-bn", weight_decay=0.1, trust=0.5, momentum=0.8, lr=0.3)
    return optim.build_optimizer(module, train)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int, poison: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if poison:
            p.grad[0] = float("nan")
    optimizer.step()


def test_a_step_by_hand() -> None:
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    mu_w = mu_b = torch.zeros(())
    optimizer = lars(layer)
    for seed in range(3):
        step(layer, optimizer, seed)
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        g = layer.weight.grad.double() + 0.1 * weight
        mu_w = 0.8 * mu_w + g * 0.5 * weight.norm() / g.norm()
        mu_b = 0.8 * mu_b + layer.bias.grad.double()
        weight, bias = weight - 0.3 * mu_w, bias - 0.3 * mu_b
        torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


def test_found_inf_turns_a_step_into_nothing() -> None:
    """As if the bad step had never been: not even momentum moves, in the first step or later."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    guarded = copy.deepcopy(plain)
    ours, theirs = lars(plain), lars(guarded)
    for seed, bad in enumerate([True, False, True, True, False]):
        theirs.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        step(guarded, theirs, seed, poison=bad)
        if not bad:
            step(plain, ours, seed)
    for a, b in zip(plain.parameters(), guarded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Stopped and resumed equals never stopped, bit for bit: momentum, and which group is not rescaled."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = lars(layer)
    step(layer, optimizer, 0)
    saved = checkpoint.load(checkpoint.save(tmp_path, layer, optimizer, None, {"step": 1}))
    again = nn.Linear(4, 3)
    again.load_state_dict(saved.model)
    resumed = lars(again)
    resumed.load_state_dict(saved.optimizer)
    for module, owner in ((layer, optimizer), (again, resumed)):
        step(module, owner, 1)
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_exempt_parameters() -> None:
    """WCL's network: 116 names hold "bn" or "bias", 63 do not, 4 of these BatchNorms of shortcuts (its quirk)."""
    encoder = networks.build_encoder(ModelConfig(encoder="resnet50", width=8), 3)
    heads = [networks.mlp_head(16, (8, 8), 4, bias=True) for _ in range(2)]
    net = nn.ModuleDict({"net": encoder, "head1": heads[0], "head2": heads[1]})

    def groups(rule: str) -> list[set[int]]:
        made = optim.parameter_groups(net, TrainConfig(decay=rule, weight_decay=0.5))  # type: ignore[arg-type]
        assert [g["weight_decay"] for g in made] == [0.5, 0.0][: len(made)]
        assert [g.get("adapt", True) for g in made] == [True, False][: len(made)]
        return [{id(p) for p in g["params"]} for g in made]

    everything = {id(p) for p in net.parameters()}
    assert groups("all") == [everything]
    plain, bare = groups("no-bias-bn-by-name")
    assert (len(plain), len(bare)) == (63, 116)
    by_type = groups("no-bias-bn")
    shortcuts = {id(b.downsample[1].weight) for n, b in encoder.named_modules() if getattr(b, "downsample", None)}
    assert len(shortcuts) == 4
    assert plain - by_type[0] == shortcuts
    assert by_type[0] < plain
    assert groups("no-1d") == by_type
    with pytest.raises(ValueError, match="no-bn-bias"):
        groups("no-bn-bias")


def test_mlp_head() -> None:
    """Parameter numbers of the published heads, and where BatchNorm and biases are."""

    def parameters(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert parameters(networks.mlp_head(2048, (2048, 2048), 256, last_norm=True)) == 8_921_088  # SCE, ImageNet
        assert parameters(networks.mlp_head(2048, (4096, 4096), 256, last_norm=True)) == 26_230_784  # with six crops
        assert parameters(networks.mlp_head(256, (4096,), 256, last_bias=False)) == 2_105_344  # its predictor
        assert parameters(networks.mlp_head(512, (512,), 128)) == 328_832  # SCE, CIFAR-10
        assert parameters(networks.mlp_head(2048, (2048, 2048), 128, bias=True)) == 8_663_168  # WCL, paper
        assert parameters(networks.mlp_head(2048, (4096, 4096), 256, bias=True)) == 26_239_232  # WCL, code
    head = networks.mlp_head(4, (5,), 3, last_norm=True, last_affine=True)
    assert list(dict(head.named_children())) == ["linear1", "bn1", "relu1", "linear2", "bn2"]
    assert head.bn2.weight is not None
    assert networks.mlp_head(4, (), 3).linear1.bias is not None
