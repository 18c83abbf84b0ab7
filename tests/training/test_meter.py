"""The split of a step's time: every part where it belongs, nothing twice."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from raycon.training import meter as meters
from raycon.training.meter import Meter, Stopwatch


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Net(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += 3.0
        return self.inner(x)


class Both(nn.Module):
    """A method: two networks (one called through its part alone), then a loss."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.student, self.teacher = clock, Net(clock), nn.Sequential(Net(clock))

    def forward(self, x: Tensor) -> Tensor:
        out = self.student(x) + self.teacher[0](x)
        self.clock.now += 2.0
        return out.sum()

    def features(self, x: Tensor) -> Tensor:
        return self.student(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(meters.time, "perf_counter", told)
    return told


def test_every_part_is_counted_once(clock: Clock) -> None:
    method, x = Both(clock), torch.ones(1, 2)
    meter = Meter(64, method)

    def batches() -> object:
        for _ in range(2):
            clock.now += 5.0  # reading
            with meter.augment:
                clock.now += 1.0
            yield None

    for epoch in range(2):
        with meter.mining:
            method.features(x)  # 3 s in a network, but not of a step
            clock.now += 4.0
        for _ in meter.waiting(batches()):  # type: ignore[arg-type]
            with meter.compute:
                loss = method(x)  # 3 + 3 + 2
                loss.backward()
                clock.now += 7.0
            clock.now += 1.5  # the optimiser
            meter.stepped()
        read = meter.read(10)
        assert read["time/step"] == pytest.approx(5 + 1 + 8 + 7 + 1.5)
        parts = {k.removeprefix("time/"): v for k, v in read.items() if k.startswith("time/") and k != "time/step"}
        assert parts == pytest.approx(
            {"data": 5, "augment": 1, "forward": 6, "loss": 2, "backward": 7, "mining": 7 / 2}
        ), epoch
        assert read["images_per_s"] == pytest.approx(64 / 22.5)
        assert read["eta_s"] == pytest.approx((22.5 + 3.5) * 10)


def test_a_pause_is_no_step(clock: Clock) -> None:
    meter = Meter(8)
    meter.stepped()
    clock.now += 100.0
    meter.pause()
    clock.now += 2.0
    meter.stepped()
    assert meter.read(0)["time/step"] == pytest.approx(2.0)


def test_a_compiled_method_is_timed_as_a_whole(clock: Clock) -> None:
    method = Both(clock)
    method._compiled_call_impl = method._call_impl
    meter = Meter(8, method)
    with meter.compute:
        method(torch.ones(1, 2))
    meter.stepped()
    assert set(meter.read(0)) == {"time/step", "time/data", "images_per_s", "eta_s"}


def test_a_stopwatch_inside_itself_counts_once(clock: Clock) -> None:
    watch = Stopwatch()
    with watch, watch:
        clock.now += 2.0
    assert watch.seconds() == pytest.approx(2.0)
    assert watch.laps == 1


@pytest.mark.gpu
def test_events_of_a_gpu() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(on_gpu=True)
    x = torch.randn(4096, 4096, device=device)
    (x @ x).sum().item()
    begin = time.perf_counter()
    with watch:
        for _ in range(20):
            x = torch.nn.functional.normalize(x @ x)
    x.sum().item()
    assert 0 < watch.seconds() <= time.perf_counter() - begin
