"""Checkpoints: one directory format, readable by anything that reads safetensors and JSON.

    checkpoints/00001234/
        model.safetensors       the method: networks, teacher, queue
        optimizer.safetensors   its state per parameter
        snapshot.safetensors    what mining found (when there is a snapshot)
        coming.safetensors      the snapshot of the next epoch (with mining.lag = 1)
        state.json              position, versions, sizes and SHA-256 of the files
    checkpoints/last -> 00001234

A directory appears under its name only when it is complete and on disk. Nothing is unpickled, ever.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import raycon
from raycon.core.types import Snapshot

FORMAT = 1
MODEL, OPTIMIZER, SNAPSHOT, STATE = "model.safetensors", "optimizer.safetensors", "snapshot.safetensors", "state.json"
COMING = "coming.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the directory, what is wrong and what to do."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint read back."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    snapshot: Snapshot | None
    state: dict[str, Any]
    coming: Snapshot | None = None
    """The snapshot that follows ``snapshot`` in the next epoch (mining.lag = 1)."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


@dataclass(frozen=True)
class Taken:
    """The content of a checkpoint to be written, in host memory."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scalars: dict[str, Any]
    snapshot: Snapshot | None
    coming: Snapshot | None
    state: dict[str, Any]
    ready: torch.cuda.Event | None = None
    """Copies from a GPU are done when this has happened."""


class Buffers:
    """Host memory that a state is copied to, used again by the next copy; pinned when the state is a GPU's."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Plain contiguous copies. Those from a GPU are only begun, in the order of its other work."""
        copies = {}
        for name, value in tensors.items():
            held = self._held.get(f"{part}/{name}")
            if held is None or held.shape != value.shape or held.dtype != value.dtype:
                held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._held[f"{part}/{name}"] = held
            copies[name] = held.copy_(
                value.detach().contiguous() if value.is_cuda else value.detach(), non_blocking=True
            )
        return copies


def take(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    snapshot: Snapshot | None,
    state: dict[str, Any],
    coming: Snapshot | None = None,
    buffers: Buffers | None = None,
) -> Taken:
    """What ``write`` writes. Without ``buffers`` the tensors are those of method and optimiser, which must not move before.

    ``state`` holds at least "step" and "evaluate". Snapshots never change, so they are not copied.
    """
    model = method.state_dict()
    tensors, scalars = _flatten_optimizer(optimizer.state_dict())
    ready = None
    if buffers is not None:
        on_gpu = any(v.is_cuda for v in model.values())
        model, tensors = buffers.copy("model", model), buffers.copy("optimizer", tensors)
        if on_gpu:
            ready = torch.cuda.Event()
            ready.record()
    return Taken(model, tensors, scalars, snapshot, coming, state, ready)


def save(
    folder: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    snapshot: Snapshot | None,
    state: dict[str, Any],
    coming: Snapshot | None = None,
) -> Path:
    """``take`` and ``write`` in one."""
    return write(folder, take(method, optimizer, snapshot, state, coming))


def write(folder: Path, taken: Taken) -> Path:
    """Write ``folder/<step>`` atomically and point ``folder/last`` to it.

    A snapshot that the previous checkpoint already holds is linked, not written.
    Raises CheckpointError when the disk is full, OSError when writing fails otherwise; what was there before is then
    untouched.
    """
    target = folder / f"{taken.state['step']:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    work = _part(target)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        if taken.ready is not None:
            taken.ready.synchronize()
        _write(work / MODEL, taken.model)
        _write(work / OPTIMIZER, taken.optimizer)
        if taken.snapshot is not None:
            _save_snapshot(folder / "last", work / SNAPSHOT, taken.snapshot)
        if taken.coming is not None:
            _save_snapshot(folder / "last", work / COMING, taken.coming)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(work.iterdir())}
        full = {"format": FORMAT, "raycon": raycon.__version__, **taken.state}
        full |= {"snapshot_version": None if taken.snapshot is None else taken.snapshot.version}
        full |= {"coming_version": None if taken.coming is None else taken.coming.version}
        full |= {"optimizer": taken.scalars, "files": files}
        _write_text(work / STATE, json.dumps(full, indent=1))
        if target.exists():  # the same step again after a resume: the same content
            _delete(target)
        os.replace(work, target)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if disk_full(error):
            last = newest(folder)[0]
            kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
            raise CheckpointError(
                f"{target} could not be written, the disk is full ({error}): {kept}; make room, then go on with "
                f"--resume {folder.parent}"
            ) from error
        raise
    _point(folder / "last", target.name)
    return target


def disk_full(error: BaseException) -> bool:
    """Is there no room (disk, quota, or the size a process may write)? safetensors tells by its words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, SafetensorError) and any(
        f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    )


def prune(folder: Path, keep: int, evaluated: Callable[[int], bool]) -> None:
    """Drop the oldest checkpoints beyond the last and ``keep`` more (0: keep all).

    Those still waiting for their evaluation stay.
    """
    old_ones = steps(folder)[: -keep - 1] if keep else []
    waiting = owed(folder, evaluated) if old_ones else []
    for old in old_ones:
        if old.name not in waiting:
            _delete(old)


def owed(folder: Path, evaluated: Callable[[int], bool]) -> list[str]:
    """The names of the checkpoints that still wait for their evaluation, oldest first."""
    found = []
    for path in steps(folder):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["evaluate"] and not evaluated(state["step"]):
                found.append(path.name)
        except (ValueError, LookupError, TypeError):
            continue  # damaged: told by who goes on from it
    return found


def clear(folder: Path) -> None:
    """Delete what a process that was killed left half written or half deleted. Nobody may be writing."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def keep_only(folder: Path, kept: Path | None) -> None:
    """Delete all checkpoints but one, which becomes ``last``. Nobody may be writing."""
    clear(folder)
    for path in folder.glob("[0-9]*"):
        if path != kept:
            shutil.rmtree(path)
    if kept is not None:
        _point(folder / "last", kept.name)
    else:
        (folder / "last").unlink(missing_ok=True)


def _part(target: Path) -> Path:
    """Where a checkpoint lies while it is not complete."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def _delete(path: Path) -> None:
    """Killed at any moment: whole, or not there."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old.part")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone)


def load(path: Path) -> Saved:
    """Read a checkpoint directory. Raises CheckpointError when it is incomplete, altered or of another format."""
    path = path.resolve()
    try:
        return _read(path)
    except CheckpointError:
        raise
    except (
        SafetensorError,
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        # A file of the right sum whose content is not what save() writes, or state.json with other things in it.
        raise CheckpointError(
            f"{path}: not as raycon writes it ({type(error).__name__}: {str(error)[:200]}); take an older checkpoint of the run"
        ) from error


def _read(path: Path) -> Saved:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {STATE}; give a directory checkpoints/<step> of a run") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE}: unreadable ({error}); take an older checkpoint of the run") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or "files" not in state or "step" not in state:
        raise CheckpointError(f"{path}: not a raycon checkpoint of format {FORMAT}")
    if type(state["step"]) is not int or state["step"] < 0 or not {MODEL, OPTIMIZER} <= set(state["files"]):
        raise CheckpointError(
            f"{path / STATE}: has no step, or names no {MODEL} and {OPTIMIZER}; take an older checkpoint"
        )
    for name, facts in state["files"].items():
        file = path / Path(name).name  # a name from a file may not lead out of the directory
        if not file.is_file() or file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file}: missing, cut off or altered; take an older checkpoint of the run")
    snapshot = None
    if state["snapshot_version"] is not None:
        snapshot = _load_snapshot(path / SNAPSHOT, state["snapshot_version"])
    coming = None
    if state.get("coming_version") is not None:
        coming = _load_snapshot(path / COMING, state["coming_version"])
    if not isinstance(state["optimizer"]["param_groups"], list):
        raise TypeError("param_groups of the optimiser is no list")
    optimizer = _unflatten_optimizer(load_file(path / OPTIMIZER), state["optimizer"])
    return Saved(path, load_file(path / MODEL), optimizer, snapshot, state, coming)


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir() and (p / STATE).is_file())


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read (None when there is none), and what was wrong with newer ones."""
    refused: list[str] = []
    for path in reversed(steps(folder)):
        try:
            load(path)
            return path, refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    # safetensors wants contiguous tensors of their own: channels_last weights become plain ones, what two names share
    # is written under both.
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    seen: set[int] = set()
    for name, value in plain.items():
        if value.numel() and value.data_ptr() in seen:
            plain[name] = value.clone()
        seen.add(value.data_ptr())
    save_file(plain, file)
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _write_text(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, name: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    os.replace(temporary, link)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"{i}.{k}": v for i, s in state["state"].items() for k, v in s.items() if isinstance(v, Tensor)}
    groups = [{k: v for k, v in g.items() if not isinstance(v, Tensor)} for g in state["param_groups"]]
    return tensors, {"param_groups": groups}


def _unflatten_optimizer(tensors: dict[str, Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": scalars["param_groups"]}


def _save_snapshot(last: Path, target: Path, snapshot: Snapshot) -> None:
    try:
        previous = json.loads((last / STATE).read_text(encoding="utf-8"))
        for name, version in ((SNAPSHOT, "snapshot_version"), (COMING, "coming_version")):
            if previous.get(version) == snapshot.version:
                os.link((last / name).resolve(), target)
                return
    except (OSError, ValueError, KeyError):
        pass  # no previous checkpoint, or a file system without links: write it
    tensors = {f"{name}.{i}": t for name in ("assignment", "prototypes", "concentration")
               for i, t in enumerate(getattr(snapshot, name))}  # fmt: skip
    if snapshot.neighbours is not None:
        tensors["neighbours"] = snapshot.neighbours
    _write(target, tensors)


def _load_snapshot(file: Path, version: int) -> Snapshot:
    tensors = load_file(file)

    def group(name: str) -> tuple[Tensor, ...]:
        return tuple(tensors[f"{name}.{i}"] for i in range(sum(k.startswith(f"{name}.") for k in tensors)))

    return Snapshot(
        version, group("assignment"), group("prototypes"), group("concentration"), tensors.get("neighbours")
    )
