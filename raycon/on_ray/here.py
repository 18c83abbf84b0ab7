"""A Ray of this machine alone: no other machine can reach it, and it may take its time to start."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

logger = logging.getLogger("raycon")

TRIES = 3


def start(**options: Any) -> None:
    """``ray.init`` of a cluster on this machine, with ``options``; tried again where the machine was too busy for it.

    Ray gives its node 30 s to come up, which no option changes.
    """
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    for left in reversed(range(TRIES)):
        try:
            with _loopback():
                ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises just that
            if "timed out during startup" not in str(error) or not left:
                raise
            logger.warning("Ray did not come up in time, the machine is busy: trying again")
            ray.shutdown()


@contextmanager
def _loopback() -> Iterator[None]:
    """Within it, what is started listens on loopback: control, workers, dashboard and metrics.

    Ray does so by itself on macOS and Windows, where this switch is off; on Linux it would listen on every interface,
    and its metrics there want no token. The processes that are started read the variable, this one has read it.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ.setdefault(name, "0")
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[name] not in ("0", "")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[name]
