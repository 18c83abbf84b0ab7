"""The charts of a sweep that raycon/report/charts.py does not have, as inline SVG in the same style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raycon.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, number, ticks

from .importance import Marginal
from .record import Trial
from .space import Choice, Domain, Space
from .watch import short, words

_WIDE = 1000
_RING = ' style="fill-opacity:.15;stroke:var(--c)"'


def parallel(space: Space, trials: Sequence[Trial], metric: str, mode: str, best: Trial | None) -> str:
    """Parallel coordinates: a vertical axis per option and one for the score, a line per trial; "" without a score."""
    scored = [t for t in trials if t.score is not None and all(name in t.options for name in space)]
    if not scored:
        return ""
    scores = [t.score or 0.0 for t in scored]
    low, high = min(scores), max(scores)
    names = [*space, metric]
    top, bottom, left, right = 34, 250, 60, 940
    xs = [left + (right - left) * i / (len(names) - 1) for i in range(len(names))]

    def y_of(place: float) -> float:
        return bottom - place * (bottom - top)

    parts = []
    for trial in sorted(scored, key=lambda t: (t is best, t.number)):
        share = (trial.score - low) / (high - low) if high > low and trial.score is not None else 1.0
        good = share if mode == "max" else 1 - share
        places = [space[n].place(trial.options[n]) for n in space] + [share]
        corners = " ".join(f"{x:.1f},{y_of(p):.1f}" for x, p in zip(xs, places, strict=True))
        style = f'style="opacity:{0.18 + 0.6 * good:.2f}"' if trial is not best else 'style="stroke-width:3.5"'
        colour = "c2" if trial is best else "c0"
        told = f"trial {trial.number}: {metric} {trial.score:.4g}, {words(trial.options)}"
        parts.append(
            f'<polyline class="line {colour}" {style} points="{corners}"><title>{escape(told)}</title></polyline>'
        )
    for x, name in zip(xs, names, strict=True):
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="name" x="{x:.1f}" y="16" text-anchor="middle">{escape(name)}</text>')
        marks = _marks(space[name]) if name in space else [(number(low), 0.0), (number(high), 1.0)]
        # Beside the last axis, where no line goes on.
        at, side = (x - 7, "end") if name in space else (x + 7, "start")
        for label, place in marks:
            parts.append(f'<text x="{at:.1f}" y="{y_of(place) + 4:.1f}" text-anchor="{side}">{escape(label)}</text>')
    label = f"Parallel coordinates of {len(scored)} trials; {metric} from {number(low)} to {number(high)}."
    title = "options and score, a line per trial; the best in bold"
    return _figure(title, label, "".join(parts), _WIDE, 266, least=max(760, 170 * len(names)))


def _marks(domain: Domain) -> list[tuple[str, float]]:
    if isinstance(domain, Choice):
        return [(short(v), domain.place(v)) for v in domain.values]
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    if domain.whole:
        return [(short(v), domain.place(v)) for v in domain.levels(5)]
    return [(short(domain.at(u)), u) for u in shares]


def response(
    name: str,
    domain: Domain,
    trials: Sequence[Trial],
    metric: str,
    compared: Mapping[int, float],
    marginal: Marginal | None,
) -> str:
    """Score against one option: the last score of each trial, and the forest's marginal with a band of one standard
    deviation.

    ``compared``: by trial, the scores the forest was fitted to, all after the same number of epochs: rings, each joined to
    the trial's last score where that is another. Filled dots trained to the end.
    """
    scored = [t for t in trials if t.score is not None and name in t.options]
    if not scored:
        return ""
    fitted = dict(compared) if marginal is not None else {}
    values = [t.score or 0.0 for t in scored] + list(fitted.values())
    if marginal is not None:
        values += [*(marginal.mean + marginal.spread), *(marginal.mean - marginal.spread)]
    low, high = float(min(values)), float(max(values))
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - pad, high + pad

    def to_xy(value: Any, score: float) -> tuple[float, float]:
        x = LEFT + (0.04 + 0.92 * domain.place(value)) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - score) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks(low, high):
        y = to_xy(domain.ends[0], tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    bottom = HEIGHT - BOTTOM
    for label, place in _marks(domain):
        x = LEFT + (0.04 + 0.92 * place) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(name)}</text>'
    )
    if marginal is not None:
        up = [to_xy(v, m + s) for v, m, s in zip(marginal.values, marginal.mean, marginal.spread, strict=True)]
        down = [to_xy(v, m - s) for v, m, s in zip(marginal.values, marginal.mean, marginal.spread, strict=True)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*up, *down[::-1]])
        line = " ".join(
            "{:.1f},{:.1f}".format(*to_xy(v, m)) for v, m in zip(marginal.values, marginal.mean, strict=True)
        )
        parts.append(f'<polygon class="area c0" style="opacity:.18" points="{band}"/>')
        parts.append(f'<polyline class="line c0" points="{line}"/>')
    for trial in scored:
        assert trial.score is not None
        x, y = to_xy(trial.options[name], trial.score)
        told = (
            f"trial {trial.number}, {trial.state} after {trial.epoch} epochs: {trial.score:.4g}, {words(trial.options)}"
        )
        before = fitted.get(trial.number)
        if before is not None and before != trial.score:
            from_y = to_xy(trial.options[name], before)[1]
            parts.append(
                f'<line class="line c1" style="opacity:.35" x1="{x:.1f}" x2="{x:.1f}" y1="{from_y:.1f}" y2="{y:.1f}"/>'
                f'<circle class="dot c1" cx="{x:.1f}" cy="{from_y:.1f}" r="3"{_RING}/>'
            )
        ring = "" if trial.state == "finished" else _RING
        parts.append(
            f'<circle class="dot c1" cx="{x:.1f}" cy="{y:.1f}" r="4"{ring}><title>{escape(told)}</title></circle>'
        )
    label = f"{metric} against {name}, {len(scored)} trials."
    return _figure(f"{metric} by {name}", label, "".join(parts), WIDTH, HEIGHT)


def bars(title: str, shares: Mapping[str, tuple[float, float]]) -> str:
    """Horizontal bars of shares 0..1, each with a whisker of its uncertainty; the largest first."""
    if not shares:
        return ""
    rows = sorted(shares.items(), key=lambda item: -item[1][0])
    height = 26 * len(rows) + 26
    left, right = 170, WIDTH - 50
    parts = []
    for i, (name, (share, uncertainty)) in enumerate(rows):
        y = 10 + 26 * i
        reach = [
            left + (right - left) * min(max(v, 0.0), 1.0) for v in (share, share - uncertainty, share + uncertainty)
        ]
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar c0" x="{left}" y="{y}" width="{max(reach[0] - left, 0.8):.1f}" height="18">'
            f"<title>{escape(name)}: {share:.0%} ± {uncertainty:.0%}</title></rect>"
        )
        parts.append(f'<line class="cross" x1="{reach[1]:.1f}" x2="{reach[2]:.1f}" y1="{y + 9}" y2="{y + 9}"/>')
        parts.append(f'<text x="{min(reach[2] + 6, right + 4):.1f}" y="{y + 13}">{share:.0%}</text>')
    told = "; ".join(f"{n} {s:.0%}" for n, (s, _) in rows)
    return _figure(title, f"{title}: {told}.", "".join(parts), WIDTH, height)


def _figure(title: str, label: str, body: str, width: int, height: int, least: int = 0) -> str:
    """``least``: pixels of width below which the figure scrolls sideways, so that its words can still be read."""
    assert math.isfinite(width * height)
    style = f' style="min-width:{least}px"' if least else ""
    return (
        f'<figure class="chart"><figcaption><span>{escape(title)}</span></figcaption><div class="scroll">'
        f'<svg viewBox="0 0 {width} {height}"{style} role="img" aria-label="{escape(label)}">{body}</svg></div></figure>'
    )
