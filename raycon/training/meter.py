"""Where the time of a step goes: waiting for data, and the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Times steps on the host clock between two readings; never synchronises with a GPU."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0
        self._data = 0.0

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
        """Start counting anew after something that is no step (a checkpoint, an E-step)."""
        self._reset()

    def read(self, steps_left: int) -> dict[str, float]:
        """Mean seconds per step since the last reading, its part spent waiting for data, images/s and the time left."""
        step = (time.perf_counter() - self._start) / max(self._steps, 1)
        data = self._data / max(self._steps, 1)
        self._reset()
        return {"time/step": step, "time/data": data, "images_per_s": self._batch / step, "eta_s": step * steps_left}
