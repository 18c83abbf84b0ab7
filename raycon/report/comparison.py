"""Several runs on one page: what differs in their configurations, their numbers side by side, their curves together."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raycon.core.config import flatten
from raycon.report import curves, page, panel_file, source
from raycon.report.charts import Series, line_chart, number
from raycon.report.source import Run

_SKIPPED = ("run.", "data.root", "data.cache", "log.")
"""Options that say where, not what."""
_CURVES = 12
_MAPS = 12
"""Runs whose map is shown."""


def compare(run_dirs: Sequence[Path], file: Path) -> Path:
    """Write a page that compares runs, finished or not, and return its path.

    Raises ValueError when a run directory is missing or fewer than two are given.
    """
    folders = [Path(folder) for folder in run_dirs]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"no run directory: {', '.join(missing)}")
    if len(folders) < 2:
        raise ValueError("a comparison needs two runs or more")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = [source.read(folder) for folder in folders]
    return page.write_page(file, render(runs, file.parent.resolve()))


def render(runs: Sequence[Run], beside: Path) -> str:
    names = labels([run.folder.resolve() for run in runs])
    sections = [
        ("differences", "Differences of configuration", _differences(runs, names)),
        ("numbers", "Numbers", _numbers(runs, names)),
        ("curves", "Curves", _curves(runs, names)),
        ("history", "Evaluations over the runs", _history(runs, names)),
        ("maps", "Maps of the embeddings", _maps(runs, names)),
        ("runs", "The runs", _listed(runs, names, beside)),
    ]
    sections = [section for section in sections if section[2]]
    notes = "".join(
        f'<p class="box note warn">{escape(name)}: {escape(note)}</p>'
        for run, name in zip(runs, names, strict=True)
        for note in run.notes
    )
    title = f"{len(runs)} runs compared"
    return page.document(title, f'<p class="soft">{escape(" · ".join(names))}</p>', sections, notes)


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names of run directories that tell them apart: as many last parts of the path as are needed."""
    for parts in range(1, max(len(f.parts) for f in folders) + 1):
        found = ["/".join(f.parts[-parts:]) for f in folders]
        if len(set(found)) == len(set(folders)):
            break
    seen: dict[str, int] = {}
    for i, name in enumerate(found):  # the same directory given twice
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            found[i] = f"{name} ({seen[name]})"
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options that are not the same in all runs, and their values; None where a run has no such option."""
    flat = [flatten(run.config) for run in runs]
    every = list(dict.fromkeys(name for options in flat for name in options))
    found = {name: [options.get(name) for options in flat] for name in every if not name.startswith(_SKIPPED)}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    found = differences(runs)
    if not found:
        return '<p class="soft">The configurations are the same (but for places).</p>'
    shared = {option: values for option, values in found.items() if None not in values}
    others = {option: values for option, values in found.items() if None in values}
    text = _option_table(shared, names) if shared else ""
    if others:  # of another method, or another version of raycon
        text += (
            f'<details class="box"><summary>Options that not every run has ({len(others)})</summary>'
            f"{_option_table(others, names)}</details>"
        )
    return text


def _option_table(found: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    rows = "".join(
        f'<tr><td class="soft">{escape(option)}</td>'
        + "".join(f'<td class="wide">{"" if v is None else escape(_shown(v))}</td>' for v in values)
        + "</tr>"
        for option, values in found.items()
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    return (
        f'<div class="box scroll"><table class="compare differs"><thead><tr><th>option</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def last_numbers(run: Run) -> dict[str, float]:
    """The run's numbers: of its newest evaluations, and of its last training line."""
    found: dict[str, float] = {}
    for entry in run.evaluations:
        if not entry.get("control"):
            found |= {k: v for k, v in entry["results"].items() if source.is_number(v) and not k.endswith("/failed")}
    if run.train:
        last: Mapping[str, Any] = run.train[-1]
        found |= {
            k: last[k]
            for k in ("loss", "health/effective_rank", "images_per_s", "step")
            if source.is_number(last.get(k))
        }
    return found


def _numbers(runs: Sequence[Run], names: Sequence[str]) -> str:
    values = [last_numbers(run) for run in runs]
    measures = list(dict.fromkeys(name for found in values for name in found))
    measures.sort(key=lambda name: (not source.higher_is_better(name), "/top1" not in name))
    if not measures:
        return '<p class="soft">No numbers yet.</p>'
    best = {m: max(v[m] for v in values if m in v) for m in measures if source.higher_is_better(m)}
    head = '<th><button type="button">run</button></th>' + "".join(
        f'<th class="n"><button type="button">{escape(m)}</button></th>' for m in measures
    )
    rows = []
    for name, found in zip(names, values, strict=True):
        cells = [f"<td>{escape(name)}</td>"]
        for m in measures:
            if m not in found:
                cells.append('<td class="n" data-value=""></td>')
                continue
            shown = f"{found[m]:.2f}" if "top" in m else number(found[m])
            css = "n best" if best.get(m) == found[m] else "n"
            cells.append(f'<td class="{css}" data-value="{found[m]!r}">{shown}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="box scroll"><table class="sort compare"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="soft">The newest evaluations of each run and its last '
        "training line; top-1 in percent; the best in bold; a click on a heading sorts.</p>"
    )


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    every = list(dict.fromkeys(n for run in runs for n in source.scalar_names(run.train)))
    first = [
        n for n in ("loss", "lr", "health/effective_rank", "health/std", "images_per_s", "gradient_norm") if n in every
    ]
    wanted = (first + [n for n in every if n.startswith(("loss/", "accuracy/")) and n not in first])[:_CURVES]
    charts = [
        line_chart(
            curves.TITLES.get(n, n),
            [Series(name, source.points(run.train, n)) for run, name in zip(runs, names, strict=True)],
            "step",
            smooth=True,
        )
        for n in wanted
    ]
    return curves.grid(charts, "No curves yet.")


def _history(runs: Sequence[Run], names: Sequence[str]) -> str:
    own = [[{"step": e.get("step"), **e["results"]} for e in run.evaluations if not e.get("control")] for run in runs]
    measures = list(dict.fromkeys(m for lines in own for m in source.scalar_names(lines) if source.higher_is_better(m)))
    measures.sort(key=lambda name: "/top1" not in name)
    every = {
        m: [Series(name, source.points(lines, m)) for lines, name in zip(own, names, strict=True)] for m in measures
    }
    worth = [m for m, series in every.items() if sum(len(s.points) for s in series) > 1]  # one point is in the table
    charts = [line_chart(m, every[m], "step") for m in worth[:_CURVES]]
    return curves.grid(charts, "No evaluations yet.")


def _maps(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The maps that the runs' reports have, side by side; "" when fewer than two have one."""
    from raycon.report import board

    drawn = []
    for run, name in zip(runs[:_MAPS], names[:_MAPS], strict=True):
        file = run.folder / panel_file.FILE
        if not file.exists():
            continue
        try:
            found = panel_file.load(file)
        except ValueError as error:
            run.notes.append(str(error))
            continue
        if (png := board.map_picture(found)) is not None:
            caption = escape(f"{name}, step {found.about['step']:,}", quote=True)
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            drawn.append(
                f'<figure class="box paper"><figcaption>{caption}</figcaption><img alt="Map of {caption}" src="{source}"></figure>'
            )
    return f'<div class="maps">{"".join(drawn)}</div>' if len(drawn) > 1 else ""


def _listed(runs: Sequence[Run], names: Sequence[str], beside: Path) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        folder = run.folder.resolve()
        report = folder / "report.html"
        shown = escape(name)
        if report.exists():
            shown = f'<a href="{quote(os.path.relpath(report, beside))}">{shown}</a>'
        rows.append(
            f'<tr><td>{shown}</td><td class="wide"><code>{escape(run.command.splitlines()[-1] if run.command else "")}</code></td></tr>'
        )
    head = "<thead><tr><th>report</th><th>command</th></tr></thead>"
    return f'<div class="box scroll"><table class="compare">{head}<tbody>{"".join(rows)}</tbody></table></div>'
