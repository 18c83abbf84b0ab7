"""Metrics of a run whose workers share no file system with its driver: an actor beside the driver writes them there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycon.core import log
from raycon.core.log import Metrics, Trackers

PICTURES = "pictures"


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Desk:
    """Writes into the run directory of the driver's machine. It has no state of its own."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = Path(run_dir)
        self._metrics = Metrics(self._run_dir / "metrics.jsonl")

    def append(self, record: dict[str, Any]) -> None:
        log.append_line(self._run_dir / "metrics.jsonl", record)

    def rewind(self, step: int) -> None:
        self._metrics.rewind(step)

    def picture(self, name: str, data: bytes) -> None:
        file = self._run_dir / PICTURES / Path(name).name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)


def start_desk(name: str, run_dir: Path) -> Any:
    """The actor on this machine; it lives as long as what this returns is kept."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = Desk.options(name=name, scheduling_strategy=here).remote(str(run_dir))  # type: ignore[attr-defined]
    ray.get(desk.rewind.remote(2**62))  # it is there
    return desk


class DeskMetrics(Metrics):
    """Metrics of rank 0, written by the desk. Lines are sent and not waited for; they arrive in order."""

    def __init__(self, desk: str, tracker: Trackers) -> None:
        self._desk: Any = ray.get_actor(desk)
        self._tracker = tracker
        self._last: Any = None

    def append(self, record: Mapping[str, Any]) -> None:
        self._last = self._desk.append.remote(dict(record))

    def rewind(self, step: int) -> None:
        ray.get(self._desk.rewind.remote(step))

    def relay(self) -> None:
        """The driver does it at the end of the run: the evaluations lie there."""

    def picture(self, step: int, file: Path) -> None:
        self._desk.picture.remote(file.name, file.read_bytes())
        super().picture(step, file)

    def close(self) -> None:
        if self._last is not None:
            ray.get(self._last)
        super().close()
