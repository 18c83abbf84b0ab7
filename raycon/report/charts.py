"""Charts as inline SVG: drawn here, no library and no network; hovering is added by the page's script.

A chart is a <figure> with a title, one or two <svg> (linear and logarithmic, switched by a button), a legend, and its
points as JSON for the script. Colours are CSS classes, so they follow the light or dark theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

Point = tuple[float, float]

WIDTH, HEIGHT = 420, 236
"""Of the viewBox: about its size on the page, so that text keeps its size."""
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 34
COLOURS = 8
"""Colours in the style sheet (c0 to c7); more series repeat them dashed."""
_MOST_POINTS = 400


class Series(NamedTuple):
    name: str
    points: Sequence[Point]
    colour: int = 0
    """Its place among the series as given: one that has no points leaves the others their colours."""


def line_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str = "", log: bool = False, smooth: bool = False
) -> str:
    """Lines over a common x. Points that are not finite are left out; "" when no point is left.

    ``log``: begin with the logarithmic axis; it is offered whenever all values are above 0 and span a factor of 3.
    ``smooth``: draw a moving average over the values where there are more than 60.
    """
    whole = [Series(s.name, finite, i) for i, s in enumerate(series) if (finite := _finite(s.points))]
    if not whole:
        return ""
    kept = [s._replace(points=_thin(s.points)) for s in whole]
    values = [y for s in kept for _, y in s.points]
    xs = [x for s in kept for x, _ in s.points]
    # A run that starts to log at step 10 still starts at 0.
    x_range = (0.0 if 0 < min(xs) < 0.1 * max(xs) else min(xs), max(xs))
    offered = min(values) > 0 and max(values) / min(values) >= 3
    drawings, axes = [], {}
    for scale in ("lin", "log") if offered else ("lin",):
        axis = _Axis(min(values), max(values), scale == "log")
        body = [_frame(x_range, axis, x_label, y_label)]
        for i, s in enumerate(kept):
            to_xy = _placing(x_range, axis)
            if smooth and len(s.points) > 60:
                average = _moving_average(whole[i].points)
                body.append(_path(s.points, to_xy, f"line raw {_colour(s.colour)}"))
                body.append(_path([average[j] for j in _thin_at(len(average))], to_xy, f"line {_colour(s.colour)}"))
            else:
                body.append(_path(s.points, to_xy, f"line {_colour(s.colour)}"))
            if len(s.points) <= 40:
                for x, y in map(to_xy, s.points):
                    body.append(f'<circle class="dot {_colour(s.colour)}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
        shown = scale == ("log" if log and offered else "lin")
        drawings.append(_svg(title, kept, "".join(body), scale, shown))
        axes[scale] = [axis.low, axis.high]
    return _figure(title, drawings, kept, {"x": x_range, "axes": axes}, x_label, log and offered)


def stacked_chart(title: str, series: Sequence[Series], x_label: str, y_label: str = "") -> str:
    """Areas on top of each other; every series must have the same x in the same order, values >= 0.

    A few peaks (a pause, a first step) are cut off where they would flatten the rest; hovering still tells them.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    assert len({tuple(x for x, _ in s.points) for s in series}) == 1
    keep = _thin_at(len(series[0].points))
    kept = [Series(s.name, [s.points[i] for i in keep], place) for place, s in enumerate(series)]
    xs = [x for x, _ in kept[0].points]
    x_range = (xs[0], xs[-1])
    base, layers = [0.0] * len(xs), []
    for s in kept:
        top = [b + max(y, 0.0) for b, (_, y) in zip(base, s.points, strict=True)]
        layers.append((base, top))
        base = top
    usual = sorted(base)[int(0.95 * (len(base) - 1))]
    cut = max(base) > 3 * usual > 0
    axis = _Axis(0.0, 1.25 * usual if cut else max(base), False)
    to_xy = _placing(x_range, axis)
    body = [_frame(x_range, axis, x_label, y_label)]
    if cut:
        above = sum(y > axis.high for y in base)
        words = f"{above} peak{'s' if above > 1 else ''} cut, up to {number(max(base))}"
        body.append(f'<text x="{WIDTH - RIGHT}" y="{TOP + 2}" text-anchor="end">{escape(words)}</text>')
        layers = [([min(y, axis.high) for y in low], [min(y, axis.high) for y in high]) for low, high in layers]
    for i, (low, high) in enumerate(layers):
        edge = [to_xy(p) for p in zip(xs, high, strict=True)] + [
            to_xy(p) for p in zip(xs[::-1], low[::-1], strict=True)
        ]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
        body.append(f'<polygon class="area {_colour(i)}" points="{corners}"/>')
    axes = {"lin": [axis.low, axis.high]}
    drawing = _svg(title, kept, "".join(body), "lin", True)
    return _figure(title, [drawing], kept, {"x": x_range, "axes": axes, "stacked": True}, x_label, False)


def split_bar(title: str, parts: Sequence[tuple[str, float]]) -> str:
    """One bar of parts (name, seconds), with their shares in words below it; "" when all are 0."""
    whole = sum(max(seconds, 0.0) for _, seconds in parts)
    if whole <= 0:
        return ""
    pieces, words = [], []
    for i, (name, seconds) in enumerate(parts):
        share = max(seconds, 0.0) / whole
        told = f"{name}: {_time(seconds)}, {share:.0%}"
        pieces.append(f'<i class="{_colour(i)}" style="flex:{share:.4f}" title="{escape(told, quote=True)}"></i>')
        words.append(
            f'<li><i class="key {_colour(i)}"></i><span>{escape(name)}</span><b>{_time(seconds)}</b><b>{share:.0%}</b></li>'
        )
    label = f"{title}: " + "; ".join(f"{name} {_time(seconds)}" for name, seconds in parts)
    return (
        f'<figure class="chart split"><figcaption><span>{escape(title)}</span><span class="soft">{_time(whole)}</span>'
        f'</figcaption><div class="pieces" role="img" aria-label="{escape(label, quote=True)}">{"".join(pieces)}</div>'
        f'<ul class="shares">{"".join(words)}</ul></figure>'
    )


def _time(seconds: float) -> str:
    if seconds >= 0.9995:
        return f"{seconds:,.1f} s"
    return f"{1000 * seconds:.3g} ms"


def histogram(title: str, counts: Sequence[tuple[int, int]], x_label: str, y_label: str, bins: int = 24) -> str:
    """Bars from (value, how often) pairs, values >= 0 whole numbers; hovering a bar shows its range and count."""
    pairs = sorted((int(v), int(n)) for v, n in counts if n > 0)
    if not pairs:
        return ""
    low, high = pairs[0][0], pairs[-1][0]
    width = max(1, -(-(high - low + 1) // bins))
    number = (high - low) // width + 1
    bar = [0] * number
    for value, count in pairs:
        bar[(value - low) // width] += count
    axis = _Axis(0.0, float(max(bar)), False)
    x_range = (float(low), float(low + number * width))
    to_xy = _placing(x_range, axis)
    body = [_frame(x_range, axis, x_label, y_label)]
    for i, count in enumerate(bar):
        if count:
            first = low + i * width
            x0, y0 = to_xy((first, count))
            x1, y1 = to_xy((first + width, 0.0))
            span = f"{first:,}" if width == 1 else f"{first:,} to {first + width - 1:,}"
            body.append(
                f'<rect class="bar c0" x="{x0 + 0.5:.1f}" y="{y0:.1f}" width="{max(x1 - x0 - 1, 0.8):.1f}" '
                f'height="{y1 - y0:.1f}"><title>{escape(x_label)} {span}: {count:,}</title></rect>'
            )
    total = sum(bar)
    label = f"{title}. {total:,} in all, {escape(x_label)} from {low:,} to {high:,}."
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'
    return f'<figure class="chart"><figcaption><span>{escape(title)}</span></figcaption>{svg}</figure>'


def number(value: float) -> str:
    """A number as short as it can be read: 4 significant digits, k / M / G from 10,000 on."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"


# --- axes and pieces --------------------------------------------------------------------------------------------


class _Axis:
    """The y axis: its range in drawn units (log10 when ``log``) and its ticks."""

    def __init__(self, low: float, high: float, log: bool) -> None:
        self.log = log
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
            pad = 0.04 * (self.high - self.low)
            self.low, self.high = self.low - pad, self.high + pad
            self.ticks = self._decades(low, high)
            return
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # a flat line sits in the middle
            pad = abs(high) * 0.5 or 1.0
            low, high = (0.0, 2 * high) if low > 0 else (low - pad * (low < 0), high + pad)
        elif low > 0 and low < 0.35 * high:
            low = 0.0  # starting near zero says more than starting at a random number
        self.ticks = ticks(low, high)
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else high - low
        self.low = min(low, math.floor(low / step + 1e-9) * step) if low >= 0 else low - 0.03 * (high - low)
        self.high = high + 0.04 * (high - low)
        self.ticks = [t for t in ticks(self.low, self.high) if self.low - 1e-12 <= t <= self.high]

    @staticmethod
    def _decades(low: float, high: float) -> list[float]:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, (last - first) // 5)
        found = [10.0**e for e in range(first, last + 1, every) if low <= 10.0**e <= high]
        if len(found) >= 2:
            return found
        finer = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        return finer if len(finer) >= 2 else ticks(low, high)

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from low to high, about so many."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _placing(x_range: Point, axis: _Axis) -> Callable[[Point], Point]:
    span = (x_range[1] - x_range[0]) or 1.0

    def to_xy(point: Point) -> Point:
        x = LEFT + (point[0] - x_range[0]) / span * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - axis.place(point[1])) * (HEIGHT - TOP - BOTTOM)

    return to_xy


def _frame(x_range: Point, axis: _Axis, x_label: str, y_label: str) -> str:
    to_xy = _placing(x_range, axis)
    parts = []
    labels = [number(tick) for tick in axis.ticks]
    if len(set(labels)) < len(labels):  # a narrow range far from 0
        labels = [f"{tick:.7g}" for tick in axis.ticks]
    for tick, label in zip(axis.ticks, labels, strict=True):
        _, y = to_xy((x_range[0], tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    bottom = HEIGHT - BOTTOM
    for tick in ticks(*x_range) if x_range[1] > x_range[0] else [x_range[0]]:
        x = LEFT + (tick - x_range[0]) / ((x_range[1] - x_range[0]) or 1.0) * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{centre}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text class="name" transform="translate(10 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
        )
    return "".join(parts)


def _path(points: Sequence[Point], to_xy: Callable[[Point], Point], css: str) -> str:
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(to_xy, points))
    return f'<polyline class="{css}" points="{corners}"/>'


def _svg(title: str, series: Sequence[Series], body: str, scale: str, shown: bool) -> str:
    told = "; ".join(
        f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}, between "
        f"{number(min(y for _, y in s.points))} and {number(max(y for _, y in s.points))}"
        for s in series
    )
    hidden = "" if shown else " hidden"
    hover = '<line class="cross" hidden/><g class="marks"></g>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {told}.")}" '
        f'data-scale="{scale}"{hidden}>{body}{hover}</svg>'
    )


def _figure(
    title: str, drawings: Sequence[str], series: Sequence[Series], data: dict[str, object], x_label: str, log: bool
) -> str:
    points = [{"name": s.name, "colour": _colour(s.colour), "at": [_short(p) for p in s.points]} for s in series]
    box = [LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM]
    shown = escape(json.dumps({**data, "box": box, "xLabel": x_label, "series": points}, separators=(",", ":")))
    button = ""
    if len(drawings) > 1:
        button = f'<button type="button" class="scale" aria-pressed="{str(log).lower()}">log</button>'
    legend = ""
    if len(series) > 1 or series[0].name != title:
        keys = "".join(f'<li><i class="key {_colour(s.colour)}"></i>{escape(s.name)}</li>' for s in series)
        legend = f'<ul class="legend">{keys}</ul>'
    return (
        f'<figure class="chart" data-chart="{shown}"><figcaption><span>{escape(title)}</span>{button}</figcaption>'
        f'<div class="plot">{"".join(drawings)}<div class="tip" hidden></div></div>{legend}</figure>'
    )


def _colour(i: int) -> str:
    return f"c{i % COLOURS}" + (" again" if i >= COLOURS else "")


def _short(point: Point) -> list[float]:
    return [float(f"{point[0]:.8g}"), float(f"{point[1]:.5g}")]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about _MOST_POINTS: of each stretch its lowest and highest point, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = -(-len(points) * 2 // _MOST_POINTS)
    kept = {0, len(points) - 1}
    for first in range(0, len(points), stretch):
        part = range(first, min(first + stretch, len(points)))
        kept |= {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _thin_at(length: int) -> list[int]:
    stretch = max(1, -(-length // _MOST_POINTS))
    return sorted({*range(0, length, stretch), length - 1})


def _moving_average(points: Sequence[Point]) -> list[Point]:
    half = max(2, len(points) // 40)
    total, sums = 0.0, [0.0]
    for _, y in points:
        total += y
        sums.append(total)
    averaged = []
    for i, (x, _) in enumerate(points):
        # The same reach on both sides, so that the ends are not pulled.
        reach = min(half, i, len(points) - 1 - i)
        averaged.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return averaged
