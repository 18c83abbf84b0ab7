"""A Ray for the loaders' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Started for a module's tests that are marked ``ray``, when one of them is to run."""
    if not any(item.get_closest_marker("ray") and item.module is request.module for item in request.session.items):
        yield
        return
    import ray

    from raycon.on_ray import here

    os.environ["RAY_AUTH_MODE"] = "disabled"
    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
