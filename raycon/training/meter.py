"""Where the time of a step goes, without ever synchronising with a GPU.

    data            waiting for the loader: reading, and whatever its workers do
    augment         the views, where the training process makes them
    forward         the networks
    loss            the rest of the method's forward
    backward        without what follows
    communication   of the gradients, as far as it was not hidden behind the backward pass (DDP's own samples)
    mining          embedding and clustering between epochs, as a mean per step

What is left of a step is the optimiser, the teacher and logging. On a GPU the parts are CUDA events, read when the loop
has read its numbers anyway; waiting and the whole step are host time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_PAIRS = 512
"""CUDA events kept between two readings; more steps than that are not timed in parts."""


class Stopwatch:
    """Adds up the time inside ``with``; a ``with`` inside another counts once."""

    def __init__(self, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self._depth = 0
        self.reset()

    @property
    def runs(self) -> bool:
        return self._depth > 0

    def reset(self) -> None:
        self._seconds = 0.0
        self._begin = time.perf_counter()
        self._pairs: list[tuple[Any, Any]] = []
        self._first: Any = None
        self.laps = 0
        """How often it was timed since then."""

    def __enter__(self) -> Stopwatch:
        self._depth += 1
        if self._depth == 1:
            self._first = self._event() if self.on_gpu and len(self._pairs) < _PAIRS else None
            self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if not self.on_gpu:
            self._seconds += time.perf_counter() - self._begin
            self.laps += 1
        elif self._first is not None:
            self._pairs.append((self._first, self._event()))
            self.laps += 1

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """The time since ``reset``; on a GPU what was recorded must have been waited for."""
        return self._seconds + sum(first.elapsed_time(last) for first, last in self._pairs) / 1000.0


class Meter:
    """Times steps between two readings. ``method``: its parts are timed by hooks (not when compiled)."""

    def __init__(
        self,
        batch: int,
        method: nn.Module | None = None,
        device: torch.device | None = None,
        net: nn.Module | None = None,
    ) -> None:
        """``net``: the method as DDP wraps it, asked for its communication."""
        self._batch, self._net = batch, net
        on_gpu = device is not None and device.type == "cuda"
        self.augment, self.networks, self.method, self.compute = (Stopwatch(on_gpu) for _ in range(4))
        self.mining = Stopwatch()
        self._mined, self._all_steps = 0.0, 0
        self._split = method is not None and not any(m._compiled_call_impl is not None for m in method.modules())
        if method is not None and self._split:
            _time(method, self.method)
            for child in method.children():
                for part in (child, *child.children()):
                    if any(True for _ in part.parameters()):
                        _time(part, self.networks, within=self.method)  # not while features are made for mining
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0
        self._data = 0.0
        for watch in (self.augment, self.networks, self.method, self.compute, self.mining):
            watch.reset()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches on and count the time spent waiting for them."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data += time.perf_counter() - begin
            yield batch

    def stepped(self) -> None:
        self._steps += 1

    def pause(self) -> None:
        """Start counting anew after something that is no step (a checkpoint)."""
        self._mined += self.mining.seconds()
        self._all_steps += self._steps
        self._reset()

    def read(self, steps_left: int) -> dict[str, float]:
        """Mean seconds per step since the last reading, in all and by part, images/s, and the time left."""
        steps = max(self._steps, 1)
        mining = self.mining.seconds()
        step = (time.perf_counter() - self._start - mining) / steps
        # On a CPU the views are made while the loop waits for the batch.
        augment = self.augment.seconds() / steps
        data = self._data / steps
        numbers = {"time/step": step, "time/data": data if self.augment.on_gpu else max(0.0, data - augment)}
        if self.augment.laps:
            numbers["time/augment"] = augment
        if self._split and self.method.laps:
            forward, whole = self.networks.seconds() / steps, self.method.seconds() / steps
            behind = communication(self._net)
            backward = max(0.0, self.compute.seconds() / steps - whole)
            numbers |= {"time/forward": forward, "time/loss": max(0.0, whole - forward)}
            numbers |= {"time/backward": max(0.0, backward - behind)}
            if behind:
                numbers["time/communication"] = min(behind, backward)
        if mining:
            numbers["time/mining"] = mining / steps
        self._mined += mining
        self._all_steps += self._steps
        mined_per_step = self._mined / max(self._all_steps, 1)
        self._reset()
        return numbers | {"images_per_s": self._batch / step, "eta_s": (step + mined_per_step) * steps_left}


def communication(net: nn.Module | None) -> float:
    """Seconds of gradient all-reduce that the backward pass did not hide, in the last step that DDP sampled; 0 without."""
    if not isinstance(net, DistributedDataParallel):
        return 0.0
    told = net._get_ddp_logging_data()
    whole, hidden = told.get("backward_comm_time", 0), told.get("backward_compute_comm_overlap_time", 0)
    return max(0.0, (float(whole) - float(hidden)) * 1e-9)


def _time(module: nn.Module, watch: Stopwatch, within: Stopwatch | None = None) -> None:
    """Time every call of a module (while ``within`` runs)."""

    def begin(*_: Any) -> None:
        if within is None or within.runs:
            watch.__enter__()

    def end(*_: Any) -> None:
        if watch.runs:
            watch.__exit__()

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
