"""What a report reads: a run directory, as far as it can be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycon.core.config import ConfigError, read_tree
from raycon.core.log import read_lines
from raycon.report.charts import Point
from raycon.report.panel_file import Panels

_HIGHER_IS_BETTER = re.compile(r"top\d|/(ami|nmi|ari|purity)$|recall_at|/m?ap$")


@dataclass
class Run:
    """What a run directory holds, as far as it can be read."""

    folder: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    notes: list[str] = field(default_factory=list)
    panels: Panels | None = None


def read(run_dir: Path) -> Run:
    """All of a run directory that can be read; the rest becomes a note."""
    run = Run(run_dir)
    found: list[dict[str, Any]] = []
    for line in read_lines(run_dir / "metrics.jsonl"):
        kind = line.get("kind")
        if kind == "evaluation":
            found.append(line)
        elif (kept := {"train": run.train, "snapshot": run.snapshots, "event": run.events}.get(str(kind))) is not None:
            kept.append(line)
    # A resumed run makes some steps again: the last one written counts.
    run.train = sorted({at(line): line for line in run.train}.values(), key=at)
    run.snapshots = sorted({at(line): line for line in run.snapshots}.values(), key=at)

    listed = _json(run_dir / "evaluations.json", run.notes)
    if isinstance(listed, list):
        run.evaluations = [e for e in listed if isinstance(e, dict) and isinstance(e.get("results"), dict)]
    elif listed is not None:
        run.notes.append("evaluations.json holds no list of evaluations")
    known = {(e.get("step"), e.get("control")) for e in run.evaluations}
    for line in found:
        if (line.get("step"), line.get("control")) not in known:
            results = {name: value for name, value in line.items() if "/" in name and is_number(value)}
            run.evaluations.append({**{k: line.get(k) for k in ("step", "epoch", "control")}, "results": results})
    run.evaluations.sort(key=lambda e: (not e.get("control"), at(e)))

    if (run_dir / "config.yaml").exists():
        try:
            tree = read_tree(run_dir / "config.yaml")
            run.config = tree if isinstance(tree, dict) else {}
        except ConfigError as error:
            run.notes.append(f"config.yaml could not be read: {error.problems[0]}")
    environment = _json(run_dir / "environment.json", run.notes)
    run.environment = environment if isinstance(environment, dict) else {}
    if (run_dir / "command.txt").exists():
        run.command = (run_dir / "command.txt").read_text(encoding="utf-8", errors="replace").strip()
    return run


def _json(file: Path, notes: list[str]) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        notes.append(f"{file.name} could not be read: {error}")
        return None


def at(line: Mapping[str, Any]) -> float:
    """Where a line stands: its step, else its epoch, else 0."""
    return next((float(line[k]) for k in ("step", "epoch") if is_number(line.get(k))), 0.0)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def higher_is_better(measure: str) -> bool:
    return _HIGHER_IS_BETTER.search(measure) is not None


def points(lines: Iterable[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    return [(at(line), line[name] * factor) for line in lines if is_number(line.get(name))]


def scalar_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """All scalars of the lines, in the order they first appear."""
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value)))
