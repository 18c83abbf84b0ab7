"""Two profiles for the fuzzers: a fast one for the suite, and ``pytest tests/fuzz --hypothesis-profile=long``."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

CALM = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fast", max_examples=25, derandomize=True, **CALM)
settings.register_profile("long", max_examples=500, **CALM)
settings.load_profile("fast")  # the option comes later and wins

CPU_SECONDS = 10.0
"""For one file of a few kilobytes; a reader that needs more hangs."""
MEMORY = 600e6
"""Bytes by which the process may grow while all examples of a test are read."""


@pytest.fixture
def guarded() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Calls a reader: fails when it takes long; and, at the end, when the memory of the process grew much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def call(work: Callable[[], object]) -> None:
        start = time.process_time()
        work()
        assert time.process_time() - start < CPU_SECONDS, "hangs"

    yield call
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"the process grew by {grown / 1e6:.0f} MB"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"
