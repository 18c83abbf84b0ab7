"""What several tests use: golden files, and functions run by two or more gloo ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


class Golden:
    """One golden file: arrays by name as tensors, and the settings of its sidecar."""

    def __init__(self, file: Path) -> None:
        self.name = file.stem
        with np.load(file) as data:
            self._arrays = {k: data[k] for k in data.files}
        self.about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = self.about.get("settings", {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.as_tensor(np.array(self._arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, prefix: str = "") -> list[str]:
        return [k for k in self._arrays if k.startswith(prefix)]


def golden_files(folder: Path, *patterns: str) -> list[Golden]:
    """All golden files of a directory that match; skips the test when there is none."""
    found = sorted({f for p in patterns for f in folder.glob(f"{p}.npz")})
    if not found:
        pytest.skip(f"{folder} has no {' or '.join(patterns)}")
    return [Golden(f) for f in found]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        results[rank] = function(*args)
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run a module-level function in ``world`` gloo processes; its return values in rank order."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, args=(world, free_port(), function, args, results), nprocs=world, join=True)
        return [results[r] for r in range(world)]
