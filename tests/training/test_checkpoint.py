from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from raycon.core.types import Snapshot
from raycon.training import checkpoint


def made(step: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer, Snapshot, dict[str, Any]]:
    torch.manual_seed(step)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    module.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.randn(2, 2, 5, 5)).square().mean().backward()
    optimizer.step()
    snapshot = Snapshot(1, (torch.arange(7) % 3,), (torch.randn(3, 4),), (torch.rand(3),), torch.randint(0, 7, (7, 2)))
    return module, optimizer, snapshot, {"step": step, "epoch": 1, "evaluate": False}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    module, optimizer, snapshot, state = made()
    path = checkpoint.save(tmp_path, module, optimizer, snapshot, state)
    saved = checkpoint.load(path)
    for name, value in module.state_dict().items():
        assert torch.equal(saved.model[name], value)
    other = torch.optim.SGD(module.parameters(), lr=0.5)
    other.load_state_dict(saved.optimizer)
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert other.param_groups[0]["lr"] == 0.1
    assert saved.snapshot is not None
    assert saved.snapshot.version == 1
    assert saved.snapshot.neighbours is not None
    assert torch.equal(saved.snapshot.prototypes[0], snapshot.prototypes[0])
    assert saved.step == 3
    assert (tmp_path / "last").resolve() == path


def test_a_snapshot_that_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    module, optimizer, snapshot, state = made()
    a = checkpoint.save(tmp_path, module, optimizer, snapshot, state)
    b = checkpoint.save(tmp_path, module, optimizer, snapshot, state | {"step": 4})
    assert os.path.samefile(a / checkpoint.SNAPSHOT, b / checkpoint.SNAPSHOT)
    assert checkpoint.load(b).snapshot is not None


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.SNAPSHOT, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    module, optimizer, snapshot, state = made()
    good = checkpoint.save(tmp_path, module, optimizer, snapshot, state)
    bad = checkpoint.save(tmp_path, module, optimizer, snapshot._replace(version=2), state | {"step": 4})
    victim = bad / file
    data = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    else:
        data = data[:-5] if damage == "cut" else data[:-8] + bytes([data[-8] ^ 0xFF]) + data[-7:]
        victim.write_bytes(data)
    if file == checkpoint.STATE and damage == "missing":
        assert checkpoint.steps(tmp_path) == [good]
    else:
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(bad)
    path, refused = checkpoint.newest(tmp_path)
    assert path == good
    assert len(refused) == (0 if file == checkpoint.STATE and damage == "missing" else 1)


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer, snapshot, state = made()
    good = checkpoint.save(tmp_path, module, optimizer, snapshot, state)
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if file.name == checkpoint.OPTIMIZER:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(checkpoint.CheckpointError, match="disk is full"):
        checkpoint.save(tmp_path, module, optimizer, snapshot, state | {"step": 4})
    assert checkpoint.newest(tmp_path) == (good, [])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_pruning_keeps_the_newest_and_what_waits_for_evaluation(tmp_path: Path) -> None:
    module, optimizer, snapshot, state = made()
    for step in range(1, 7):
        checkpoint.save(tmp_path, module, optimizer, snapshot, state | {"step": step, "evaluate": step in (1, 2)})
    assert checkpoint.owed(tmp_path, lambda step: step == 2) == ["00000001"]
    checkpoint.prune(tmp_path, 2, lambda step: step == 2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["00000001", "00000004", "00000005", "00000006"]


def test_a_state_file_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    module, optimizer, snapshot, state = made()
    path = checkpoint.save(tmp_path / "c", module, optimizer, snapshot, state)
    (tmp_path / "secret").write_text("x")
    found = json.loads((path / "state.json").read_text())
    found["files"] |= {
        "../../secret": {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    }
    (path / "state.json").write_text(json.dumps(found))
    with pytest.raises(checkpoint.CheckpointError, match="secret"):
        checkpoint.load(path)
