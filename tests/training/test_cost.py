"""Plans: what is counted against arithmetic done by hand, and the formulas at their ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycon.core.config import RunConfig, override
from raycon.index import plan as index_plan
from raycon.recipes import recipe
from raycon.training import cost, job


def small(name: str = "fashion-mnist-simclr-cpu", **options: object) -> RunConfig:
    return override(recipe(name), {"model.width": 8, **options})


def forward_flops(config: RunConfig) -> float:
    """2 x multiplications of every convolution and linear layer that features() of one image calls."""
    facts = cost.Facts(1000, 1, None, config.train.batch, 1, config.data.size, 1)
    method, found = job.build_method(config, facts, 3).eval(), []

    def counted(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            inside = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            found.append(2.0 * inside * out[0].numel())
        elif isinstance(layer, nn.Linear):
            found.append(2.0 * layer.in_features * layer.out_features)

    for module in method.modules():
        module.register_forward_hook(counted)  # type: ignore[arg-type]
    with torch.no_grad():
        method.features(torch.randn(1, 3, config.data.size, config.data.size))
    return sum(found)


def test_arithmetic_is_that_of_the_layers() -> None:
    config = small()
    counted = cost.count(config, 3, 1, batch=8)
    forward = forward_flops(config)
    assert counted.scan_flops == pytest.approx(forward)
    # Two views, each forward and twice that backward, but for the first layer's input; a little for the similarities.
    assert 5.5 * forward < counted.step_flops < 6.1 * forward
    assert counted.view_bytes == 2 * 3 * config.data.size**2 * 4
    method = job.build_method(config, cost.Facts(1000, 1, None, 256, 1, 28, 1), 3)
    assert counted.parameters == sum(p.numel() for p in method.parameters())


def test_activations_grow_with_the_images_and_not_with_the_weights() -> None:
    one, two = (cost.count(small(), 3, 1, batch=b) for b in (8, 16))
    assert one.activation_bytes == pytest.approx(two.activation_bytes, rel=0.05)
    assert one.state_bytes == two.state_bytes


def counted(**changed: float) -> cost.Counted:
    values = {"batch": 4, "step_flops": 6e9, "scan_flops": 1e9, "activation_bytes": 1e6, "step_seconds": 0.1}
    values |= {"parameters": 1_000_000, "state_bytes": 4_000_000, "view_bytes": 1000} | changed
    return cost.Counted(**values)  # type: ignore[arg-type]


def test_one_rank_sends_nothing_and_scales() -> None:
    found = cost.plan(small(), counted(), 60_000, 1)
    assert found.network_bytes == {}
    assert found.scaling == pytest.approx(1.0)
    assert found.steps == 60_000 // 256
    assert found.seconds == pytest.approx(36 * 234 * 256 * 6e9 / 100e12)


def test_many_ranks_exchange_gradients_and_scale_less() -> None:
    assumed = cost.Assumed(flops=1e12, network=1e6, overlap=0.5)
    found = cost.plan(small(), counted(), 60_000, 4, assumed)
    assert found.network_bytes["gradients (ring all-reduce)"] == 2 * 3 / 4 * 4_000_000
    assert found.compute_seconds == pytest.approx(64 * 6e9 / 1e12)
    sent = sum(found.network_bytes.values())
    assert found.exposed_seconds == pytest.approx(sent / 1e6 - 0.5 * found.compute_seconds * 2 / 3)
    assert found.scaling == pytest.approx(found.compute_seconds / (found.compute_seconds + found.exposed_seconds))
    fast = cost.plan(small(), counted(), 60_000, 4, cost.Assumed(flops=1e12, network=1e15))
    assert fast.scaling == pytest.approx(1.0)


def test_mining_is_the_indexs_own_plan() -> None:
    config = small("fashion-mnist-pcl-cpu")
    found = cost.plan(config, counted(), 60_000, 2)
    wanted = index_plan.plan(60_000, 128, (500, 1000, 1500), 2, iterations=10, redo=1)
    assert found.index == wanted
    assert found.refreshes == 30  # of 36 epochs, after 6 without
    assert found.embed_seconds == pytest.approx(1e9 * 30_000 / 100e12)
    training = found.steps * 36 * found.step_seconds
    assert found.seconds == pytest.approx(training + 30 * (found.embed_seconds + wanted.seconds))
    assert found.rank_bytes["snapshot"] == wanted.snapshot_bytes


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        cost.plan(small(), counted(), 60_000, 3)
    with pytest.raises(ValueError, match="more than 100 images"):
        cost.plan(small(), counted(), 100, 1)
