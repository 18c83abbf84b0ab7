"""The report page: a run directory in, one HTML file out that opens from disk and asks nothing of a network.

Whatever is missing, unfinished or torn is left out or said in a note: a report never fails because a run did.
"""

from __future__ import annotations

import base64
import datetime
import json
import logging
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import raycon
from raycon.core.config import flatten
from raycon.report import curves, panel_file, panels
from raycon.report.charts import Series, line_chart, number
from raycon.report.curves import grid, nothing
from raycon.report.panel_file import Panels
from raycon.report.source import Run, at, higher_is_better, is_number, points, read
from raycon.report.template import SCRIPT, STYLE

logger = logging.getLogger("raycon")

_PAGE_BYTES = 9_500_000
"""What a page may have: the files in pictures/ are shown as long as there is room."""
_CAPTIONS = {"views": "Augmented views actually seen: the views of one sample side by side, from the first batch"}
_FOLDED = ("config", "environment")
"""Sections that begin folded: long, and seldom wanted."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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


# --- the page ---------------------------------------------------------------------------------------------------


def render(run: Run) -> str:
    sections = [("evaluations", "Evaluations", _evaluations(run))]
    style, css = STYLE, ""
    if run.panels is not None:
        sheet = panels.Sheet(run.panels)
        sections += panels.sections(run.panels, sheet)
        style += sheet.style()
        css = ' class="small-pictures"' if sheet.tiles.shape[1] < 64 else ""
    sections += [
        ("losses", "Losses", curves.losses(run)),
        ("learning-rate", "Learning rate, momentum, temperature", curves.schedules(run)),
        ("clusters", "Cluster sizes", curves.clusters(run)),
        ("health", "Feature health", curves.health(run)),
        ("speed", "Throughput and time", curves.speed(run)),
        ("views", "Augmented views", ""),
        ("config", "Resolved configuration", _config(run)),
        ("environment", "Environment", _environment(run)),
        ("command", "Command", _command(run)),
    ]
    room = _PAGE_BYTES - len(style) - sum(len(text) for _, _, text in sections)
    sections = [(name, head, _pictures(run, room) if name == "views" else text) for name, head, text in sections]
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
        f'<section id="{name}" aria-labelledby="{name}-head"><details{"" if name in _FOLDED else " open"}><summary><h2 id="{name}-head">{head}</h2>'
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
        left = last.get("eta_s")
        state = f"unfinished, {_clock(float(left))} left at its last line" if left and is_number(left) else "unfinished"
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
                ("Loss", f"{late:.3f}", f"mean of the last {len(losses[-20:])} lines; {losses[0]:.3f} at first")
            )
        if ranks := points(run.train, "health/effective_rank"):
            cards.append(("Effective rank", number(ranks[-1][1]), "of the features, at the last epoch's end"))
        steps = f" of {last['steps']:,.0f}" if is_number(last.get("steps")) else ""
        epochs = f" of {last['epochs']}" if is_number(last.get("epochs")) else ""
        epoch = f"epoch {last['epoch'] + 1}{epochs}" if is_number(last.get("epoch")) else ""
        cards.append(("Steps", f"{at(last):,.0f}", f"{steps.strip()} · {epoch}".strip(" ·")))
        if speeds := [y for _, y in points(run.train, "images_per_s")]:
            cards.append(("Images per second", number(statistics.median(speeds)), "median, all ranks"))
        times = [line["time"] for line in run.train if is_number(line.get("time"))]
        if len(times) > 1:
            cards.append(("Wall time", _clock(max(times) - min(times)), "first to last training line"))
    if not cards:
        return nothing("No numbers yet: this run has written no training line and no evaluation.")
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="what">{escape(what)}</div><div class="number">{escape(shown)}</div>'
            f'<div class="more">{escape(more)}</div></div>'
            for what, shown, more in cards
        )
        + "</div>"
    )


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _best(results: Mapping[str, Any], pattern: str) -> tuple[str, float] | None:
    fitting = [(name, value) for name, value in results.items() if re.match(pattern, name) and is_number(value)]
    return max(fitting, key=lambda pair: pair[1], default=None)


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = "".join(
        f'<tr><td class="n">{at(e):,.0f}</td><td class="wide">{escape(str(e.get("text", "")))}</td></tr>'
        for e in run.events
    )
    head = '<thead><tr><th class="n">step</th><th>what happened</th></tr></thead>'
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    open_ = " open" if len(run.events) > 1 else ""
    return f'<details class="box" id="events"{open_}><summary>Events ({len(run.events)})</summary>{table}</details>'


def _evaluations(run: Run) -> str:
    if not run.evaluations:
        return nothing("No evaluation yet.")
    measures = list(
        dict.fromkeys(name for e in run.evaluations for name in e["results"] if not name.endswith("/failed"))
    )
    measures.sort(key=lambda name: (not higher_is_better(name) or "held_out" in name, "/top1" not in name))
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
    own = [{"step": at(e), **e["results"]} for e in run.evaluations if not e.get("control")]
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


def _pictures(run: Run, room: int) -> str:
    files = sorted((run.folder / "pictures").glob("*.png"), key=lambda f: (f.stem != "views", f.name))
    shown, used = [], 0
    for file in files:
        data = file.read_bytes()
        caption = escape(_CAPTIONS.get(file.stem, file.stem.replace("_", " ").replace("-", " ")))
        used += len(data) * 4 // 3
        if used > room:
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
        return nothing("No picture of the views yet.")
    return f'<div class="pictures">{"".join(shown)}</div>'


def _config(run: Run) -> str:
    if not run.config:
        return nothing("No config.yaml yet.")
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
        return nothing("No environment.json yet.")
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
        return nothing("No command.txt yet.")
    return f'<pre>{escape(run.command)}</pre><button type="button" class="copy">copy</button>'
