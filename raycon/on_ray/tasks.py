"""A function over many items by Ray tasks: results in order, a bounded number of them on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray


def in_order(
    function: Callable[[Any, Any], Any],
    shared: Any,
    items: Iterable[Any],
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[Any]:
    """``function(shared, item)`` of every item, in order; at most 2 ``workers`` results are under way or waiting.

    shared: put into the object store once. cpus, gpus: of each task. What a task raises is raised here, as it was.
    """
    kept = ray.put(shared)
    task = ray.remote(_call).options(num_cpus=cpus, num_gpus=gpus)  # type: ignore[attr-defined]
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(task.remote(function, kept, item))
            if len(waiting) >= 2 * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _call(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    return function(shared, item)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
