"""Shared by all tests: options, and the two ways a test can be impossible here (no GPU, no FFCV)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # tests start and end their own clusters on loopback
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    here = Path(__file__).parent / "golden"
    parser.addoption("--golden", type=Path, default=here, help="directory of golden vectors (.npz with .json)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = pytest.mark.skip(reason="no CUDA device here")
    ffcv = pytest.mark.skip(reason="FFCV is not installed here (its headers are missing; see make setup)")
    for item in items:
        if "gpu" in item.keywords and not _cuda():
            item.add_marker(gpu)
        if "ffcv" in item.keywords and importlib.util.find_spec("ffcv") is None:
            item.add_marker(ffcv)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.config.getoption("--golden")
    return folder.resolve()
