"""The report page: a run directory in, one HTML file out that opens from disk and asks nothing of a network.

Whatever is missing, unfinished or torn is left out or said in a note: a report never fails because a run did.
"""

from __future__ import annotations

import base64
import datetime
import json
import logging
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import raycon
from raycon.core.config import ConfigError, flatten, read_tree
from raycon.core.log import read_lines
from raycon.report import panel_file, panels
from raycon.report.charts import Point, Series, histogram, line_chart, number, stacked_chart
from raycon.report.panel_file import Panels
from raycon.report.template import SCRIPT, STYLE

logger = logging.getLogger("raycon")

_PICTURE_BYTES = 6_000_000
"""Of all pictures together: the page stays under 10 MB."""
_CAPTIONS = {"views": "Augmented views actually seen: the views of one sample side by side, from the first batch"}
_CLUSTERING = re.compile(r"(?:clusters|index)/(\d+)/(.+)")
_HIGHER_IS_BETTER = re.compile(r"top\d|/(ami|nmi|ari|purity)$|recall_at|/m?ap$")
_NOT_CURVES = {"step", "steps", "epoch", "epochs", "time", "eta_s", "images_per_s", "loss", "lr"}
_PARTS = {
    "time/data": "waiting for data",
    "time/augment": "augment",
    "time/forward": "forward",
    "time/loss": "loss",
    "time/backward": "backward",
    "time/communication": "communication",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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


def write(run_dir: Path, gather: bool = False, rows: int = 0) -> Path:
    """Write ``report.html`` into a run directory, finished or not, and return its path.

    ``gather``: make the pictures of what was learned (``panels.npz``) first, unless they are there for the newest
    checkpoint already; ``rows``: from so many images (0: as many as are quick). Without ``gather`` those that are
    there are shown. Raises ValueError when there is no such directory; pictures that cannot be made become a note.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a run directory")
    run = read(run_dir)
    run.panels = _panels(run, gather, rows)
    return write_page(run_dir / "report.html", render(run))


def write_page(file: Path, text: str) -> Path:
    """Write a page in one move."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
    return file


def _panels(run: Run, gather: bool, rows: int) -> Panels | None:
    file = run.folder / panel_file.FILE
    found = None
    if file.exists():
        try:
            found = panel_file.load(file)
        except ValueError as error:
            run.notes.append(str(error))
    steps = [int(p.name) for p in (run.folder / "checkpoints").glob("[0-9]*") if p.name.isdecimal()]
    if not gather or not steps or (found is not None and found.about["step"] == max(steps) and not rows):
        return found
    try:
        from raycon.report import sample  # torch

        found = sample.gather(run.folder, rows)
        panel_file.save(found, file)
    except Exception as error:  # whatever it is, the rest of the report is worth having
        logger.debug("pictures of the report", exc_info=True)
        run.notes.append(f"The pictures of what was learned could not be made: {type(error).__name__}: {error}")
    return found


# --- reading ----------------------------------------------------------------------------------------------------


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
    run.train = sorted({_at(line): line for line in run.train}.values(), key=_at)
    run.snapshots = sorted({_at(line): line for line in run.snapshots}.values(), key=_at)

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
    run.evaluations.sort(key=lambda e: (not e.get("control"), _at(e)))

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


def _at(line: Mapping[str, Any]) -> float:
    """Where a line stands: its step, else its epoch, else 0."""
    return next((float(line[k]) for k in ("step", "epoch") if is_number(line.get(k))), 0.0)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def higher_is_better(measure: str) -> bool:
    return _HIGHER_IS_BETTER.search(measure) is not None


def points(lines: Iterable[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    return [(_at(line), line[name] * factor) for line in lines if is_number(line.get(name))]


def scalar_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """All scalars of the lines, in the order they first appear."""
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if is_number(value)))


# --- the page ---------------------------------------------------------------------------------------------------


def render(run: Run) -> str:
    sections = [
        ("evaluations", "Evaluations", _evaluations(run)),
        ("losses", "Losses", _losses(run)),
        ("learning-rate", "Learning rate, momentum, temperature", _schedules(run)),
    ]
    style, css = STYLE, ""
    if run.panels is not None:
        sheet = panels.Sheet(run.panels)
        sections += panels.sections(run.panels, sheet)
        style += sheet.style()
        css = ' class="small-pictures"' if sheet.tiles.shape[1] < 64 else ""
    sections += [
        ("clusters", "Cluster sizes", _clusters(run)),
        ("health", "Feature health", _health(run)),
        ("speed", "Throughput and time", _speed(run)),
        ("views", "Augmented views", _pictures(run)),
        ("config", "Resolved configuration", _config(run)),
        ("environment", "Environment", _environment(run)),
        ("command", "Command", _command(run)),
    ]
    notes = "".join(f'<p class="box note warn">{escape(note)}</p>' for note in run.notes)
    said = "" if run.panels is None else f'<p class="soft">{escape(panels.said_of(run.panels))}</p>'
    head = f'<section id="headline" aria-label="Headline numbers">{_headline(run)}{said}</section>{_events(run)}'
    return document(run.folder.resolve().name, _subtitle(run), sections, notes + head, style, _per_epoch(run), css)


def document(
    title: str,
    subtitle: str,
    sections: Sequence[tuple[str, str, str]],
    before: str,
    style: str = STYLE,
    per_epoch: float = 0.0,
    css: str = "",
) -> str:
    """A whole page: header with links, ``before``, and sections (anchor, heading, HTML) that fold."""
    links = "".join(f'<a href="#{name}">{head}</a>' for name, head, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><details open><summary><h2 id="{name}-head">{head}</h2>'
        f"</summary>{text}</details></section>"
        for name, head, text in sections
    )
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} - raycon</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f'<body data-per-epoch="{per_epoch:g}"{css}><header><h1>{escape(title)}</h1>{subtitle}'
        f'<nav aria-label="Sections">{links}</nav></header><main>{before}{body}</main>'
        f"<footer>Written {escape(when)} by raycon {escape(raycon.__version__)}</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _per_epoch(run: Run) -> float:
    """Steps per epoch, 0 when unknown."""
    last = run.train[-1] if run.train else {}
    if is_number(last.get("steps")) and is_number(last.get("epochs")) and last["epochs"] > 0:
        return float(last["steps"]) / float(last["epochs"])
    return 0.0


def _subtitle(run: Run) -> str:
    def option(group: str, name: str) -> str:
        options = run.config.get(group)
        return str(options.get(name) or "") if isinstance(options, dict) else ""

    words = [option("method", "name"), option("model", "encoder"), option("data", "name")]
    said = " · ".join(escape(w) for w in words if w)
    last = run.train[-1] if run.train else {}
    if not last:
        state = "no training line yet"
    elif is_number(last.get("steps")) and last.get("step", 0) >= last["steps"]:
        state = "finished"
    else:
        state = "unfinished"
    return f'<p class="soft">{said + " · " if said else ""}{state}</p>'


def _headline(run: Run) -> str:
    own = [e for e in run.evaluations if not e.get("control")]
    cards = []
    for what, pattern in (("kNN top-1", r"knn/.*top1"), ("Linear probe top-1", r"linear/top1$")):
        for entry in reversed(own):
            best = _best(entry["results"], pattern)
            if best:
                more = [best[0]] if "_k" in best[0] else []
                for control in (e for e in run.evaluations if e.get("control")):
                    if other := _best(control["results"], pattern):
                        more.append(f"{control['control']} {other[1]:.1f}\u00a0%")
                cards.append((what, f"{best[1]:.1f}\u00a0%", " · ".join(more)))
                break
    if run.train:
        last = run.train[-1]
        if losses := [y for _, y in points(run.train, "loss")]:
            late = statistics.fmean(losses[-20:])
            cards.append(
                ("Loss", f"{late:.3f}", f"mean of the last {len(losses[-20:])} lines; began at {losses[0]:.3f}")
            )
        if ranks := points(run.train, "health/effective_rank"):
            cards.append(("Effective rank", number(ranks[-1][1]), "of the features, at the end"))
        steps = f" of {last['steps']:,.0f}" if is_number(last.get("steps")) else ""
        epochs = f" of {last['epochs']}" if is_number(last.get("epochs")) else ""
        epoch = f"epoch {last['epoch'] + 1}{epochs}" if is_number(last.get("epoch")) else ""
        cards.append(("Steps", f"{_at(last):,.0f}", f"{steps.strip()} · {epoch}".strip(" ·")))
        if speeds := [y for _, y in points(run.train, "images_per_s")]:
            cards.append(("Images per second", number(statistics.median(speeds)), "median, all ranks"))
        times = [line["time"] for line in run.train if is_number(line.get("time"))]
        if len(times) > 1:
            seconds = round(max(times) - min(times))
            clock = f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
            cards.append(("Wall time", clock, "first to last training line"))
    if not cards:
        return _nothing("No numbers yet: this run has written no training line and no evaluation.")
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="what">{escape(what)}</div><div class="number">{escape(shown)}</div>'
            f'<div class="more">{escape(more)}</div></div>'
            for what, shown, more in cards
        )
        + "</div>"
    )


def _best(results: Mapping[str, Any], pattern: str) -> tuple[str, float] | None:
    fitting = [(name, value) for name, value in results.items() if re.match(pattern, name) and is_number(value)]
    return max(fitting, key=lambda pair: pair[1], default=None)


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = "".join(
        f'<tr><td class="n">{_at(e):,.0f}</td><td class="wide">{escape(str(e.get("text", "")))}</td></tr>'
        for e in run.events
    )
    head = '<thead><tr><th class="n">step</th><th>what happened</th></tr></thead>'
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return f'<details class="box" id="events" open><summary>Events ({len(run.events)})</summary>{table}</details>'


def _evaluations(run: Run) -> str:
    if not run.evaluations:
        return _nothing("No evaluation yet.")
    measures = list(
        dict.fromkeys(name for e in run.evaluations for name in e["results"] if not name.endswith("/failed"))
    )
    measures.sort(key=lambda name: not higher_is_better(name) or "held_out" in name)
    best = {
        name: max((e["results"][name] for e in run.evaluations if is_number(e["results"].get(name))), default=None)
        for name in measures
        if higher_is_better(name)
    }
    heads = "".join(
        f'<th{css}><button type="button">{escape(name)}</button></th>'
        for name, css in [
            ("step", ' class="n"'),
            ("epoch", ' class="n"'),
            ("of", ""),
            *((m, ' class="n"') for m in measures),
        ]
    )
    rows = []
    for entry in run.evaluations:
        of = entry.get("control") or "checkpoint"
        where = ["", ""] if entry.get("control") else [_whole(entry.get("step")), _whole(entry.get("epoch"))]
        cells = [f'<td class="n" data-value="{v}">{v}</td>' for v in where] + [f"<td>{escape(str(of))}</td>"]
        for name in measures:
            value = entry["results"].get(name)
            if is_number(value):
                css = "n best" if best.get(name) == value else "n"
                shown = f"{value:.2f}" if "top" in name else number(value)
                cells.append(f'<td class="{css}" data-value="{value!r}">{shown}</td>')
            else:
                failed = f"{name.split('/')[0]}/failed" in entry["results"]
                cells.append(
                    '<td class="n failed" data-value="">failed</td>' if failed else '<td class="n" data-value=""></td>'
                )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = (
        f'<div class="box scroll"><table class="sort"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">top-1 in percent; the best of each column in bold; a click on a heading sorts.</p>'
    )
    failures = "".join(
        f'<p class="box note warn">{escape(name)} failed at step {_whole(e.get("step"))}: {escape(str(text))}</p>'
        for e in run.evaluations
        for name, text in (e.get("failed") or {}).items()
    )
    return failures + table + _history(run, measures)


def _history(run: Run, measures: Sequence[str]) -> str:
    """Curves of the evaluations over the run, one chart per evaluation and unit; needs two checkpoints."""
    own = [{"step": _at(e), **e["results"]} for e in run.evaluations if not e.get("control")]
    if len({e["step"] for e in own}) < 2:
        return ""
    groups: dict[str, list[str]] = {}
    for name in measures:
        evaluation, measure = name.split("/", 1) if "/" in name else (name, name)
        if "top" in measure:
            groups.setdefault(f"{evaluation}: accuracy", []).append(name)
        elif higher_is_better(name):
            groups.setdefault(f"{evaluation}: agreement with labels", []).append(name)
    charts = []
    for title, names in groups.items():
        series = [Series(n.split("/", 1)[-1], points(own, n)) for n in names]
        charts.append(line_chart(title, series, "step", "%" if "accuracy" in title else ""))
    return grid(charts, "")


def _whole(value: Any) -> str:
    return f"{value:.0f}" if is_number(value) else ""


def _losses(run: Run) -> str:
    names = scalar_names(run.train)
    parts = [n for n in names if n.startswith("loss/")]
    total = Series("loss", points(run.train, "loss"))
    charts = [line_chart("loss", [total], "step", smooth=True)]
    if parts:
        series = [Series(n.removeprefix("loss/"), points(run.train, n)) for n in parts]
        charts.append(line_chart("parts of the loss", series, "step", smooth=True))
    others = [n for n in names if n not in _NOT_CURVES and not n.startswith(("loss/", "health/", "time/"))]
    charts += [line_chart(n, [Series(n, points(run.train, n))], "step", smooth=True) for n in others]
    return grid(charts, "No loss yet.")


def _schedules(run: Run) -> str:
    """Curves of what changes over the run; what stays the same is said in a sentence."""
    charts = [line_chart("lr", [Series("lr", points(run.train, "lr"))], "step")]
    options = run.config.get("method")
    last = run.train[-1] if run.train else {}
    same = []
    if isinstance(options, dict) and is_number(last.get("steps")) and is_number(last.get("epochs")):
        steps, epochs = int(last["steps"]), int(last["epochs"])
        for title, curve in (
            ("momentum of the teacher", _momentum(options, steps, epochs)),
            ("temperature of the similarities", _constant(options.get("temperature"), steps)),
            ("temperature of the targets", _target_temperature(options, steps, epochs)),
        ):
            if len({y for _, y in curve}) > 1:
                charts.append(line_chart(title, [Series(title, curve)], "step"))
            elif curve:
                same.append(f"{title} {number(curve[0][1])}")
    said = f'<p class="soft">The same in all steps: {escape(", ".join(same))}.</p>' if same else ""
    return grid(charts, "No learning rate yet.") + said


def _constant(value: Any, steps: int) -> list[Point]:
    return [(0.0, float(value)), (float(steps), float(value))] if is_number(value) else []


def _momentum(options: Mapping[str, Any], steps: int, epochs: int) -> list[Point]:
    """The teacher's momentum as the method's schedule gives it."""
    schedule = options.get("momentum_schedule")
    if not is_number(options.get("momentum")) or not isinstance(schedule, str):
        return _constant(options.get("momentum"), steps)
    from raycon.core.types import Progress
    from raycon.nn import optim

    at = sorted({steps * i // 100 for i in range(100)} | {steps - 1})
    try:
        return [
            (
                float(s),
                float(
                    optim.momentum_at(schedule, options["momentum"], Progress(s, steps, s * epochs // steps), epochs)
                ),
            )  # type: ignore[arg-type]
            for s in at
        ]
    except ValueError:  # a schedule of another version
        return []


def _target_temperature(options: Mapping[str, Any], steps: int, epochs: int) -> list[Point]:
    """The temperature of soft targets: constant, or rising linearly in the first epochs."""
    end = options.get("teacher_temperature", options.get("soft_temperature"))
    start, warm = options.get("teacher_temperature_start"), options.get("teacher_temperature_epochs")
    if not is_number(end) or not is_number(start) or not is_number(warm) or not warm or epochs < 1:
        return _constant(end, steps)
    assert start is not None
    return [(0.0, float(start)), (warm * steps / epochs, float(end)), (float(steps), float(end))]


def _clusters(run: Run) -> str:
    """How large the clusters of each clustering are: over the run, and in the last snapshot; and its other numbers."""
    sizes: dict[int, list[tuple[float, list[tuple[int, int]]]]] = {}
    scalars: dict[str, dict[int, list[Point]]] = {}
    for line in run.snapshots:
        for name, value in line.items():
            found = _CLUSTERING.fullmatch(name)
            if found is None:
                continue
            which, measure = int(found[1]), found[2]
            if measure == "sizes_histogram" and (pairs := _pairs(value)):
                sizes.setdefault(which, []).append((_at(line), pairs))
            elif is_number(value):
                scalars.setdefault(measure, {}).setdefault(which, []).append((_at(line), value))
    charts = []
    for which, history in sorted(sizes.items()):
        title = f"clustering {which}: {sum(n for _, n in history[-1][1]):,} clusters"
        lines = [
            Series(name, [(x, _quantile(pairs, share)) for x, pairs in history])
            for name, share in (("largest", 1.0), ("largest tenth", 0.9), ("median", 0.5), ("smallest", 0.0))
        ]
        charts.append(line_chart(f"{title}, sizes over the run", lines, "step", "rows", log=True))
        charts.append(
            histogram(f"{title}, sizes at the last snapshot", history[-1][1], "rows in a cluster", "clusters")
        )
    for measure, by_clustering in scalars.items():
        lines = [Series(f"clustering {which}", points) for which, points in sorted(by_clustering.items())]
        charts.append(line_chart(measure, lines, "step"))
    seconds = [n for n in scalar_names(run.snapshots) if n in ("seconds", "embed_seconds")]
    if seconds:
        told = {"seconds": "whole snapshot", "embed_seconds": "of it embedding"}
        series = [Series(told[n], points(run.snapshots, n)) for n in seconds]
        charts.append(line_chart("time to mine", series, "step", "seconds"))
    return grid(charts, "No snapshot: nothing was mined yet, or the method mines nothing.")


def _pairs(value: Any) -> list[tuple[int, int]]:
    """[[size, how many clusters], ...] sorted by size; [] for anything else."""
    if not isinstance(value, list) or not all(
        isinstance(p, list) and len(p) == 2 and all(is_number(v) for v in p) for p in value
    ):
        return []
    return sorted((int(size), int(count)) for size, count in value if count > 0)


def _quantile(pairs: Sequence[tuple[int, int]], share: float) -> float:
    """The size that ``share`` of the clusters do not exceed; pairs sorted by size."""
    wanted, seen = share * sum(n for _, n in pairs), 0
    for size, count in pairs:
        seen += count
        if seen >= wanted:
            return float(size)
    return float(pairs[-1][0])


def _health(run: Run) -> str:
    told = {
        "health/std": "spread: std of unit features x sqrt(D), 1 = even",
        "health/effective_rank": "effective rank of the features",
    }
    names = [n for n in scalar_names(run.train) if n.startswith("health/")]
    charts = [line_chart(told.get(n, n), [Series(told.get(n, n), points(run.train, n))], "step") for n in names]
    return grid(charts, "No feature health yet.")


def _speed(run: Run) -> str:
    charts = [
        line_chart("images per second, all ranks", [Series("images per second, all ranks", speed)], "step", smooth=True)
        if (speed := points(run.train, "images_per_s"))
        else ""
    ]
    named = [n for n in scalar_names(run.train) if n.startswith("time/") and n not in ("time/step", "time/mining")]
    parts = sorted(named, key=lambda n: list(_PARTS).index(n) if n in _PARTS else len(_PARTS))
    timed = [line for line in run.train if all(is_number(line.get(n)) for n in ("time/step", *parts))]
    advice = ""
    if timed:
        series = [Series(_PARTS.get(n, n.removeprefix("time/")), points(timed, n, 1000.0)) for n in parts]
        rest = [(_at(line), 1000.0 * max(0.0, line["time/step"] - sum(line[n] for n in parts))) for line in timed]
        series.append(Series("the rest of the step" if parts else "step", rest))
        if any(is_number(line.get("time/mining")) for line in timed):
            mining = [(_at(line), 1000.0 * line.get("time/mining", 0.0)) for line in timed]
            series.append(Series("mining, per step", mining))
        charts.append(stacked_chart("time of a step", series, "step", "ms"))
        if "time/data" in parts:
            advice = _advice(_shares(timed, parts))
    return advice + grid(charts, "No timing yet.")


def _shares(timed: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> dict[str, float]:
    """The share of each part in a step, 0 to 1 (median of the lines), and of mining in the whole time (mean)."""
    steps = [line for line in timed if line["time/step"] > 0]
    if not steps:
        return {}
    shares = {n.removeprefix("time/"): statistics.median(line[n] / line["time/step"] for line in steps) for n in parts}
    mining = sum(line.get("time/mining", 0.0) for line in steps)
    shares["mining"] = mining / (mining + sum(line["time/step"] for line in steps))
    return shares


def _advice(shares: Mapping[str, float]) -> str:
    """Plain sentences on where the time goes and what to do about it."""

    def share(part: str) -> float:
        return shares.get(part, 0.0)

    found = []
    if share("data") > 0.25:
        found.append(
            f"You are data bound: {share('data'):.0%} of a step is waiting for images. Give data.workers, use "
            "--data.loader ffcv, or fewer and larger steps."
        )
    if share("augment") > 0.3:
        found.append(
            f"{share('augment'):.0%} of a step makes augmented views in the training process: give data.workers or "
            "--data.loader ffcv, or a GPU."
        )
    if share("communication") > 0.2:
        found.append(
            f"You are network bound: {share('communication'):.0%} of a step waits for gradients of other ranks. Larger "
            "batches per rank, train.accumulate, or a faster network between the machines."
        )
    if share("mining") > 0.3:
        found.append(
            f"Mining takes {share('mining'):.0%} of the time: a larger method.refresh-epochs, mining.init warm, or more "
            "mining.shards."
        )
    if found:
        return "".join(f'<p class="box note warn">{escape(text)}</p>' for text in found)
    text = f"{share('data'):.0%} of a step is waiting for images: the network, not the data, sets the pace"
    if "forward" in shares:
        text += f" ({share('forward') + share('backward'):.0%} forward and backward, {share('loss'):.0%} loss)"
    return f'<p class="box note">{escape(text)}.</p>'


def _pictures(run: Run) -> str:
    files = sorted((run.folder / "pictures").glob("*.png"), key=lambda f: (f.stem != "views", f.name))
    shown, used = [], 0
    for file in files:
        data = file.read_bytes()
        caption = escape(_CAPTIONS.get(file.stem, file.stem.replace("_", " ").replace("-", " ")))
        used += len(data) * 4 // 3
        if used > _PICTURE_BYTES:
            used -= len(data) * 4 // 3
            shown.append(
                f'<p class="box note">{escape(file.name)} is left out: {len(data) / 1e6:.1f} MB is too large here.</p>'
            )
            continue
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        shown.append(
            f'<figure class="box"><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>'
        )
    if not shown:
        return _nothing("No picture of the views yet.")
    return f'<div class="pictures">{"".join(shown)}</div>'


def _config(run: Run) -> str:
    if not run.config:
        return _nothing("No config.yaml yet.")
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in run.config.items():
        if isinstance(value, dict):
            groups.setdefault(str(name), {}).update(flatten(value, f"{name}."))
        else:
            groups["run"][str(name)] = value
    boxes = "".join(
        f'<details class="box" open><summary>{escape(group)}</summary>{_table(options)}</details>'
        for group, options in groups.items()
        if options
    )
    return f'<div class="settings">{boxes}</div>'


def _environment(run: Run) -> str:
    if not run.environment:
        return _nothing("No environment.json yet.")
    return f'<div class="settings"><div class="box">{_table(flatten(run.environment))}</div></div>'


def _table(options: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, default=str)

    rows = "".join(
        f'<tr><td class="wide">{escape(str(name))}</td><td class="wide">{escape(shown(value))}</td></tr>'
        for name, value in options.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _command(run: Run) -> str:
    if not run.command:
        return _nothing("No command.txt yet.")
    return f'<pre>{escape(run.command)}</pre><button type="button" class="copy">copy</button>'


def grid(charts: Iterable[str], empty: str) -> str:
    drawn = "".join(charts)
    if drawn:
        return f'<div class="charts">{drawn}</div>'
    return _nothing(empty) if empty else ""


def _nothing(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
