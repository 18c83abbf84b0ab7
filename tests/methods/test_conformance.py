"""What every method keeps to. A new file in raycon/methods is tested here without a word.

Each method is built small, from its own Options: widths, queues and cluster numbers shrunk, all else as it is by
default, and then once more for every other choice of each of its options.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import Facts, MethodOptions
from raycon.core.types import Batch, Mined, Needs, Output, Progress, Snapshot
from raycon.methods.base import Method
from raycon.training import loop
from tests.helpers import on_ranks

ROWS, BATCH, SIDE, STEPS, CLASSES = 64, 16, 8, 4, 3
FACTS = Facts(rows=ROWS, classes=CLASSES, image=(1, SIDE, SIDE), batch=BATCH, world=1, size=SIDE, epochs=2)
LABELS = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(6))
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

pytestmark = pytest.mark.usefixtures("_one_thread")


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Encoder(nn.Module):
    features = 12

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, self.features, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(self.features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def small(name: str, **values: Any) -> MethodOptions:
    """The options of a method, every large number made small; ``values`` on top."""
    made = methods.configure(name)
    shrunk: dict[str, Any] = {}
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if isinstance(value, int) and value > 32:
            shrunk[field.name] = 32
        if isinstance(value, tuple) and any(isinstance(v, int) and v > 32 for v in value):
            shrunk[field.name] = tuple(40 + 4 * i for i in range(len(value)))
    return methods.configure(name, **shrunk | values)


def alternatives() -> list[tuple[str, dict[str, Any]]]:
    """Every method as it is by default, and with every other value of its switches, one at a time."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in methods.names():
        found.append((name, {}))
        made, hints = methods.configure(name), typing.get_type_hints(methods.options(name))
        for field in dataclasses.fields(made):
            value, kind = getattr(made, field.name), hints[field.name]
            choices: tuple[Any, ...] = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
            if isinstance(value, bool):
                choices = (True, False)
            found += [(name, {field.name: choice}) for choice in choices if choice != value]
    return found


def build(options: MethodOptions, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method: Method = methods.module(options.name).build(options, Encoder(), FACTS)
    return method.train()


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def batch_for(needs: Needs, step: int = 0) -> Batch:
    """The global batch of a step: the images of some rows, each view with noise of its own."""
    row = (torch.arange(BATCH) * 3 + 5 * step) % ROWS
    images = random(ROWS, 1, SIDE, SIDE, seed=1)[row]
    noise = [0.3 * random(BATCH, 1, SIDE, SIDE, seed=100 * step + v + 2) for v in range(len(needs.views))]
    return Batch(tuple(images + n for n in noise), row, LABELS[row])


def snapshot_for(method: Method, seed: int = 3) -> Snapshot | None:
    needs = method.needs
    if not needs.snapshot:
        return None
    with torch.no_grad():
        dim = copy.deepcopy(method).eval().features(random(2, 1, SIDE, SIDE, seed=4)).shape[1]
    generator = torch.Generator().manual_seed(seed)
    return Snapshot(
        0,
        tuple(torch.randperm(ROWS, generator=generator) % k for k in needs.clusterings),
        tuple(F.normalize(torch.randn(k, dim, generator=generator)) for k in needs.clusterings),
        tuple(0.1 + torch.rand(k, generator=generator) for k in needs.clusterings) if needs.temperature else (),
        torch.randint(ROWS, (ROWS, needs.neighbours), generator=generator) if needs.neighbours else None,
    )


def mined_for(method: Method, step: int = 0, seed: int = 3) -> Mined:
    snapshot = snapshot_for(method, seed)
    used = () if snapshot is None else tuple(int(a.max()) + 1 for a in snapshot.assignment)
    return Mined(snapshot, used, 77 + step, epoch=1, step=step, steps=STEPS)


def part(batch: Batch) -> Batch:
    """This rank's rows of a global batch."""
    world, rank = dist.world(), dist.rank()
    return Batch(
        tuple(v.chunk(world)[rank] for v in batch.views), batch.row.chunk(world)[rank], batch.label.chunk(world)[rank]
    )


def train_steps(method: Method, steps: int, first: int = 0, parts: int = 1) -> list[Output]:
    """Some steps of plain gradient descent, gradients averaged over the ranks as DDP does."""
    outputs = []
    if first == 0:
        method.before_training((part(batch_for(method.needs, s)) for s in itertools.count(50)), 9)
    for step in range(first, first + steps):
        batch = part(batch_for(method.needs, step))
        output = loop.forward_backward(method, batch, mined_for(method, step), parts)
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.grad = dist.mean(parameter.grad)
                    parameter -= 0.05 * parameter.grad
        method.after_step(output.keep, Progress(step, STEPS, 0))
        outputs.append(output)
        if step < first + steps - 1:
            method.zero_grad()
    return outputs


def loss_of(method: Method, batch: Batch, mined: Mined) -> float:
    with torch.no_grad():
        return float(method(batch, mined).loss)


def effect_of(method: Method, batch: Batch, mined: Mined) -> list[float]:
    """Numbers for all that a step does: its loss, and what it keeps for after_step."""
    with torch.no_grad():
        output = method(batch, mined)
    return [float(output.loss), *(float(v.double().sum()) for v in output.keep.values())]


def unless_refused(name: str, changes: dict[str, Any]) -> MethodOptions:
    options = small(name, **changes)
    if problems := options.problems(FACTS):
        pytest.skip(f"needs more than this one option: {problems[0]}")
    return options


def label_of(case: object) -> str:
    return ",".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else str(case)


# --- one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), alternatives(), ids=label_of)
def test_a_step(name: str, changes: dict[str, Any]) -> None:
    """Finite, differentiable to the encoder, and nothing but after_step changes state."""
    method = build(unless_refused(name, changes))
    train_steps(method, 1)
    method.zero_grad()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    batch, mined = batch_for(method.needs, 1), mined_for(method, 1)
    torch.manual_seed(1)
    output = loop.forward_backward(method, batch, mined, 1)
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    changed = [k for k, v in method.state_dict().items() if not torch.equal(v, before[k])]
    assert [k for k in changed if not k.endswith(STATISTICS)] == []
    for value in [*output.keep.values(), *output.metrics.values()]:
        assert not value.requires_grad
    assert all(v.ndim == 0 for v in output.metrics.values())
    assert len({len(v) for v in output.keep.values()}) <= 1
    for key, parameter in method.encoder().named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
    assert method.encoder().get_parameter("conv.weight").grad.abs().sum() > 0  # type: ignore[union-attr]
    without = [k for k, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert method.unused_parameters or not without

    torch.manual_seed(2)
    assert loss_of(method, batch, mined) == float(output.loss.detach()), "a draw from outside of mined.seed"
    if "bf16" not in changes:
        method.bf16 = True
        rounded = method(batch, mined).loss
        assert rounded.dtype == torch.float32
        assert abs(float(rounded.detach()) - float(output.loss.detach())) < 0.1 + 0.1 * abs(float(output.loss.detach()))
        half = batch._replace(views=tuple(view.bfloat16() for view in batch.views))
        assert torch.equal(method(half, mined).loss, rounded)  # what autocast does to the views a loader may do before


@pytest.mark.parametrize("name", methods.names())
def test_state_dict_round_trip(name: str) -> None:
    """A method put back from its state goes on as the one that was never stopped: losses and state, bit for bit."""
    first = build(small(name))
    train_steps(first, 2)
    second = build(small(name), seed=1)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    first.zero_grad()
    losses_of = [[float(o.loss.detach()) for o in train_steps(m, 2, first=2)] for m in (first, second)]
    assert losses_of[0] == losses_of[1]
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", methods.names())
def test_micro_batches(name: str) -> None:
    """Halves of a batch give after_step what the whole gives: the same queue, bar BatchNorm (here in eval mode)."""
    whole, halves = (frozen(build(small(name))) for _ in range(2))
    (one,), (two,) = train_steps(whole, 1), train_steps(halves, 1, parts=2)
    assert {k: v.shape for k, v in one.keep.items()} == {k: v.shape for k, v in two.keep.items()}
    for key, value in whole.named_buffers():
        torch.testing.assert_close(value, halves.get_buffer(key), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "changes"), alternatives(), ids=label_of)
def test_declared_needs_are_the_ones_used(name: str, changes: dict[str, Any]) -> None:
    method = build(unless_refused(name, changes))
    train_steps(method, 1)
    needs, batch, mined = method.needs, batch_for(method.needs, 1), mined_for(method, 1)
    effect = effect_of(method, batch, mined)
    other_labels = batch._replace(label=LABELS.flip(0)[batch.row])
    assert (loss_of(method, other_labels, mined) != effect[0]) == needs.labels
    for v in range(len(needs.views)):
        views = list(batch.views)
        views[v] = random(*views[v].shape, seed=9)
        assert effect_of(method, batch._replace(views=tuple(views)), mined) != effect, f"view {v}"
    if needs.clusterings:
        assert loss_of(method, batch, mined_for(method, 1, seed=8)) != effect[0]


@pytest.mark.parametrize("name", methods.names())
def test_features_and_encoder(name: str) -> None:
    method = build(small(name)).eval()
    images = random(5, 1, SIDE, SIDE, seed=5)
    with torch.no_grad():
        features, encoded = method.features(images), method.encoder()(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    assert features.dtype == torch.float32
    assert encoded.shape == (5, Encoder.features)
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    assert {id(p) for p in method.encoder().parameters()} <= trained


@pytest.mark.parametrize("name", methods.names())
def test_options(name: str) -> None:
    """Defaults are usable with ImageNet; a number below its range is refused by its dotted name, before anything."""
    made = methods.configure(name)
    assert made.name == name
    assert (
        made.problems(Facts(rows=1_281_167, classes=1000, image=None, batch=256, world=2, size=224, epochs=200)) == []
    )
    options = small(name)
    assert options.problems(FACTS) == []
    floats = [f.name for f in dataclasses.fields(options) if isinstance(getattr(options, f.name), float)]
    for field in floats:
        refused = dataclasses.replace(options, **{field: -1.0}).problems(FACTS)
        assert any(f"method.{field}" in p for p in refused), f"method.{field} = -1 is let through"
    for field in (f for f in floats if "temperature" in f and getattr(options, f) > 0):
        if not any(f"method.{field}" in p for p in dataclasses.replace(options, **{field: 0.0}).problems(FACTS)):
            assert "base" in field, f"method.{field} = 0 is let through"  # 0: without that factor


# --- two ranks --------------------------------------------------------------------------------------------------


def frozen(method: Method) -> Method:
    """BatchNorm in eval mode: what is left does not depend on how a batch is divided."""
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return method


def two_steps(name: str, batch_norm: bool) -> dict[str, Any]:
    method = build(small(name)) if batch_norm else frozen(build(small(name)))
    outputs = train_steps(method, 2)
    return {
        "loss": [float(dist.mean(o.loss.detach())) for o in outputs],
        "grad": {k: p.grad.clone() for k, p in method.named_parameters() if p.grad is not None},
        "state": {k: v.clone() for k, v in method.state_dict().items() if not k.endswith(STATISTICS)},
    }


def all_methods() -> dict[tuple[str, bool], dict[str, Any]]:
    return {(n, bn): two_steps(n, bn) for n in methods.names() for bn in (True, False)}


@pytest.mark.ranks
def test_two_ranks() -> None:
    """Queues and weights are the same on both ranks bit for bit; and those of one process where a method says so."""
    first, second = on_ranks(2, all_methods)
    for case, ours in first.items():
        for key, value in ours["state"].items():
            assert torch.equal(value, second[case]["state"][key]), f"{case}: {key} differs between the ranks"
    for name in methods.names():
        alone = two_steps(name, batch_norm=False)
        if not type(build(small(name))).ranks_agree:
            continue
        ours = first[name, False]
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4), name
        for kind in ("grad", "state"):
            for key, value in ours[kind].items():
                torch.testing.assert_close(
                    value, alone[kind][key], rtol=1e-3, atol=1e-5, msg=lambda m, n=f"{name} {key}": f"{n}: {m}"
                )
