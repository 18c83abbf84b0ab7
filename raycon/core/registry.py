"""What the run directories below a folder say: configuration, state, numbers. Only reads them, however they ended."""

from __future__ import annotations

import difflib
import json
import operator
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycon.core.config import ConfigError, flatten, read_tree

QUIET_MINUTES = 60.0
"""A run that is not finished counts as running while its files changed in the last so many minutes: it may be on another
machine, in a long clustering."""
RESTART_MINUTES = 2.0
"""The same when its processes were on this machine and are gone, or it was asked to stop: it may be starting again."""
PLACES = ("run.", "data.root", "data.cache", "log.")
"""Options that say where, not what: left out of comparisons."""
_DEPTH = 5


@dataclass(frozen=True)
class Run:
    """A run directory as it is now."""

    path: Path
    name: str
    """Its path below the folder it was found in."""
    status: str
    """finished, running, failed, stopped, new (no step yet) or unreadable."""
    config: Mapping[str, Any]
    """Flat: dotted option to value."""
    step: int
    steps: int
    """0: it never started."""
    changed: float
    """When its files last changed, seconds since 1970."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """The newest training record of metrics.jsonl."""
    results: Mapping[str, float] = field(default_factory=dict)
    """The newest number of each evaluation."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """The run's own entries of evaluations.json, by step."""
    note: str = ""
    """What went wrong, or what of it cannot be read."""

    def values(self) -> dict[str, Any]:
        """Everything that can be asked for by name: options, the newest training numbers and results, and the state."""
        numbers = {k: v for k, v in self.train.items() if k not in ("kind", "time")}
        epochs = self.config.get("train.epochs", 0)
        state = {"name": self.name, "status": self.status, "step": self.step, "steps": self.steps}
        state |= {"method": self.config.get("method.name", ""), "data": self.config.get("data.name", "")}
        state |= {"epochs": epochs, "epoch": round(self.step / self.steps * epochs, 2) if self.steps else 0}
        state |= {"changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(self.changed))}
        return {**self.config, **numbers, **self.results, **state}


# --- reading ----------------------------------------------------------------------------------------------------


def find(folders: Iterable[Path]) -> list[Run]:
    """The runs in and below the folders, newest change first. Raises ConfigError for a folder that is not there."""
    places: dict[Path, str] = {}
    problems = []
    for folder in folders:
        if not folder.is_dir():
            problems.append(f"{folder}: no such folder; give the folder that holds the runs, or a run directory")
            continue
        for path in _walk(folder, _DEPTH):
            places.setdefault(path.resolve(), folder.name if path == folder else str(path.relative_to(folder)))
    if problems:
        raise ConfigError(problems)
    return sorted((read(path, name) for path, name in places.items()), key=lambda run: -run.changed)


def is_run(folder: Path) -> bool:
    """Is it a run directory? It has a configuration and something that a run leaves."""
    signs = ("metrics.jsonl", "checkpoints", "command.txt", "log.txt")
    return (folder / "config.yaml").is_file() and any((folder / sign).exists() for sign in signs)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth:
        for inside in sorted(folder.iterdir()):
            if inside.is_dir() and not inside.is_symlink() and not inside.name.startswith("."):
                yield from _walk(inside, depth - 1)


def read(path: Path, name: str = "") -> Run:
    """One run directory. What cannot be read is said in ``note``."""
    name = name or path.name
    notes = []
    config: dict[str, Any] = {}
    try:
        loaded = read_tree(path / "config.yaml")
        if not isinstance(loaded, Mapping):
            raise ConfigError([f"{path / 'config.yaml'}: no options in it"])
        config = flatten(loaded)
    except ConfigError as error:
        notes += [f"config.yaml: {p.removeprefix(str(path / 'config.yaml')).lstrip(': ')}" for p in error.problems]
    start, train = _newest_records(path / "metrics.jsonl", ("start", "train"))
    entries = _evaluations(path, notes)
    results: dict[str, float] = {}
    for entry in entries:
        results |= entry["results"]
    state = _last_state(path)
    steps = int(state.get("steps") or start.get("steps") or 0)
    done = bool(steps) and int(state.get("step", -1)) == steps
    evaluated = not config.get("evals.names") or any(e.get("step") == steps for e in entries)
    changed = max(
        _mtime(path / n) for n in ("metrics.jsonl", "evaluations.json", "log.txt", "config.yaml", "checkpoints")
    )
    failure = _failure(path)
    here = set(start.get("hosts", [""])) == {socket.gethostname()}
    patience = RESTART_MINUTES if (here or (path / "stop").exists()) and not done else QUIET_MINUTES
    if any(_alive(int(pid), float(start.get("time", 0.0))) for pid in start.get("pids", [])):
        status = "running"
    elif done and evaluated:
        status = "finished"
    elif failure:
        status, notes = "failed", [failure, *notes]
    elif time.time() - changed < 60 * patience:
        status = "running"
    elif done:
        status = "finished"
        notes.append("its last checkpoint has not been evaluated")
    else:
        status = "stopped" if steps else "new"
    if not config:
        status = "unreadable"
    step = max(int(state.get("step", 0)), int(train.get("step", 0)))
    return Run(path, name, status, config, step, steps, changed, train, results, entries, "; ".join(notes))


def _mtime(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _newest_records(file: Path, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The last record of each kind in a metrics file, {} where there is none. Only those lines are parsed."""
    try:
        data = file.read_bytes()
    except OSError:
        return [{} for _ in kinds]
    found = []
    for kind in kinds:
        record: dict[str, Any] = {}
        end = len(data)
        while not record and (at := data.rfind(f'"kind": "{kind}"'.encode(), 0, end)) >= 0:
            first = data.rfind(b"\n", 0, at) + 1
            try:
                record = json.loads(data[first : data.find(b"\n", at) + 1 or None])
            except ValueError:
                end = first  # torn: take the one before
        found.append(record)
    return found


def _evaluations(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        entries = json.loads((path / "evaluations.json").read_text(encoding="utf-8"))
        own = [e for e in entries if "control" not in e and isinstance(e.get("results"), dict)]
        return sorted(own, key=lambda e: int(e.get("step", 0)))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        notes.append(f"evaluations.json: {error}")
        return []


def _last_state(path: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint, {} when there is none that can be read."""
    for folder in sorted((path / "checkpoints").glob("[0-9]*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict):
            return state
    return {}


def _failure(path: Path) -> str:
    try:
        return str(json.loads((path / "failure.json").read_text(encoding="utf-8"))["error"]).splitlines()[0]
    except (OSError, ValueError, KeyError, IndexError):
        return ""


def _alive(pid: int, since: float) -> bool:
    """Does the process that wrote a record at ``since`` still run here? Not one that was given its number later."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
        )
    except (OSError, ValueError, IndexError, StopIteration):
        return True  # no /proc: take it for the same
    return boot + ticks / os.sysconf("SC_CLK_TCK") <= since + 2


# --- choosing ---------------------------------------------------------------------------------------------------

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def choose(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that meet every condition ``KEY OP VALUE``: OP one of = != < > <= >= or ~ (contains).

    A run without the key meets only !=. Raises ConfigError for a condition that cannot be read, and a key that no run
    has.
    """
    problems, tests = [], []
    known = {k for run in runs for k in run.values()}
    for condition in conditions:
        match = re.fullmatch(r"\s*([^\s=!<>~]+)\s*(<=|>=|!=|=|<|>|~)\s*(.*?)\s*", condition)
        if match is None:
            problems.append(f"--where {condition!r}: give KEY=VALUE, with = != < > <= >= or ~ (contains)")
        elif runs and match[1] not in known:
            problems.append(unknown_key("--where", match[1], known))
        else:
            tests.append((match[1], match[2], match[3]))
    if problems:
        raise ConfigError(problems)
    return [run for run in runs if all(_meets(run.values(), *test) for test in tests)]


def _meets(values: Mapping[str, Any], key: str, compare: str, wanted: str) -> bool:
    if key not in values:
        return compare == "!="
    value = values[key]
    if compare == "~":
        return wanted.lower() in text(value).lower()
    number = _number(wanted)
    if number is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _COMPARE[compare](float(value), number)
    return _COMPARE[compare](text(value).lower(), wanted.lower())


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def unknown_key(option: str, key: str, known: Iterable[str]) -> str:
    """A message about a key that no run has, with the nearest one."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5) or [k for k in names if key in k][:3]
    return f"{option} {key!r}: no run has it" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")


def order(runs: Sequence[Run], key: str, ascending: bool = False) -> list[Run]:
    """The runs by a value, largest first; those without it last. Raises ConfigError when no run has it."""
    values: dict[Path, Any] = {run.path: run.values().get(key) for run in runs}
    if runs and all(v is None for v in values.values()):
        raise ConfigError([unknown_key("--sort", key, {k for run in runs for k in run.values()})])
    there = [run for run in runs if values[run.path] is not None]
    numeric = all(isinstance(values[run.path], (int, float)) for run in there)

    def place(run: Run) -> Any:
        return values[run.path] if numeric else text(values[run.path])

    there.sort(key=place, reverse=not ascending)
    return there + [run for run in runs if values[run.path] is None]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options that are not the same in all runs, and their values; None where a run has no such option."""
    names = dict.fromkeys(k for run in runs for k in run.config if not k.startswith(PLACES))
    found = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def text(value: Any) -> str:
    """A value as it is shown."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return str(value)


# --- disk -------------------------------------------------------------------------------------------------------


def disk(folder: Path) -> int:
    """Bytes below a folder, a file with several names counted once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


def size(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
