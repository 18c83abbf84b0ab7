"""Plans: what is counted against arithmetic done by hand, and the formulas at their ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycon.core.config import RunConfig, override
from raycon.index import plan as index_plan
from raycon.recipes import recipe, recipes
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
    one, two = (cost.count(small(), 3, 1, batch=b) for b in (48, 96))
    assert one.activation_bytes == pytest.approx(two.activation_bytes, rel=0.1)
    assert one.fixed_bytes < 8 * one.parameters * 4
    assert one.state_bytes == two.state_bytes


def counted(**changed: object) -> cost.Counted:
    values = {"batch": 4, "step_flops": 6e9, "scan_flops": 1e9, "activation_bytes": 1e6, "step_seconds": 0.1}
    values |= {"parameters": 1_000_000, "state_bytes": 4_000_000, "view_bytes": 1000} | changed  # type: ignore[dict-item]
    return cost.Counted(**values)  # type: ignore[arg-type]


def test_one_rank_sends_nothing_and_scales() -> None:
    found = cost.plan(small(), counted(), 60_000, 1)
    assert found.network_bytes == {}
    assert found.scaling == pytest.approx(1.0)
    assert found.steps == 60_000 // 256
    assert found.seconds == pytest.approx(36 * 234 * 256 * 6e9 / 100e12)


def test_many_ranks_exchange_gradients_and_scale_less() -> None:
    assumed = cost.Assumed(flops=1e12, network=1e6, overlap=0.5, latency=0.0)
    given = counted(world=4, sent={"embeddings (all-gather)": 1024.0}, calls=3)
    found = cost.plan(small(), given, 60_000, 4, assumed)
    assert found.network_bytes == {
        "gradients (ring all-reduce)": 2 * 3 / 4 * 4_000_000,
        "embeddings (all-gather)": 64 * 1024,
    }
    assert found.compute_seconds == pytest.approx(64 * 6e9 / 1e12)
    behind = 6.0 - 0.5 * found.compute_seconds * 2 / 3
    assert found.exposed_seconds == pytest.approx(behind + 64 * 1024 / 1e6)
    assert found.scaling == pytest.approx(found.compute_seconds / (found.compute_seconds + found.exposed_seconds))
    fast = cost.plan(small(), given, 60_000, 4, cost.Assumed(flops=1e12, network=1e15, latency=0.0))
    assert fast.scaling == pytest.approx(1.0)
    late = cost.plan(small(), given, 60_000, 4, cost.Assumed(flops=1e12, network=1e15, latency=0.001))
    assert late.exposed_seconds == pytest.approx(3 * 0.001 * 2)  # three calls, two doublings
    with pytest.raises(ValueError, match="counted for one rank, planned for 2"):
        cost.plan(small(), counted(), 60_000, 2)


def test_what_simclr_gathers_is_counted() -> None:
    """Both views' embeddings go to the three other ranks; the gradients of the others' rows go back to them."""
    found = cost.count(small(), 1, 1, batch=8, world=4)
    assert found.sent == {
        "embeddings (all-gather)": 3 * 2 * 128 * 4,
        "their gradients (reduce-scatter)": 3 / 4 * (4 * 2 * 128 * 4),
    }
    assert found.calls == 2


@pytest.mark.parametrize("name", ["fashion-mnist-moco-cpu", "fashion-mnist-simclr-cpu"])
def test_what_is_counted_for_some_ranks_holds_for_others(name: str) -> None:
    two, five = (cost.count(small(name), 1, 1, batch=8, world=world) for world in (2, 5))
    assert two.at(5).sent == pytest.approx(five.sent)
    assert five.at(2).sent == pytest.approx(two.sent)
    assert not any(five.at(1).sent.values())


@pytest.mark.parametrize("world", [2, 3])
def test_what_moco_sends_is_counted(world: int) -> None:
    """Keys for the queue go to all; the key's image goes to another rank, its embedding comes back."""
    found = cost.count(small("fashion-mnist-moco-cpu"), 1, 1, batch=8, world=world)
    assert found.sent == pytest.approx(
        {
            "shuffled images and keys (all-to-all)": (world - 1) / world * (28 * 28 * 4 + 128 * 4),
            "embeddings (all-gather)": (world - 1) * 128 * 4,
        }
    )


def test_synchronised_batchnorm_is_counted_by_its_layers() -> None:
    config = small(**{"model.sync_bn": True})
    found, without = cost.count(config, 1, 1, batch=8, world=2), cost.count(small(), 1, 1, batch=8, world=2)
    method = job.build_method(config, cost.Facts(1000, 1, None, 256, 1, 28, 1), 1)
    widths = [m.num_features for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # Two views; forward mean, inverse deviation, count; backward two sums in a ring of two.
    assert found.synced_bytes == 2 * sum((2 * w + 1) * 4 + 2 * w * 4 for w in widths)
    assert found.sent == without.sent
    assert found.calls == without.calls + 2 * 2 * len(widths)


@pytest.mark.parametrize("name", [n for n in recipes() if n.startswith("fashion-mnist-") and n.endswith("-cpu")])
def test_every_method_can_be_planned(name: str) -> None:
    found = cost.plan(small(name), cost.count(small(name), 1, 4, batch=8, world=2), 60_000, 2)
    assert all(size > 0 for size in found.network_bytes.values())
    assert ("embeddings (all-gather)" in found.network_bytes) == (name != "fashion-mnist-supervised-cpu")


def test_mining_is_the_indexs_own_plan() -> None:
    config = small("fashion-mnist-pcl-cpu")
    found = cost.plan(config, counted(world=2), 60_000, 2)
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
