"""The sections of the page that are curves: losses, schedules, clusters, feature health, time."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from raycon.report.charts import Point, Series, histogram, line_chart, number, split_bar, stacked_chart
from raycon.report.source import Run, at, is_number, points, scalar_names

_CLUSTERING = re.compile(r"(?:clusters|index)/(\d+)/(.+)")
_NOT_CURVES = {"step", "steps", "epoch", "epochs", "time", "eta_s", "images_per_s", "loss", "lr", "mining/version"}
_ELSEWHERE = ("loss/", "health/", "time/", "ranks/")
"""Scalars with a place of their own on the page."""
TITLES = {
    "accuracy/instance": "own view found among the candidates, share",
    "accuracy/prototype": "own prototype found among the prototypes, share",
    "accuracy/positive": "a positive found first, share",
    "accuracy/coarse": "coarse class recognised, share",
    "accuracy/class": "class recognised, share",
    "weak/components": "components of the neighbour graph in a batch",
    "weak/positives": "weak positives of an image",
    "gradient_norm": "gradient norm",
    "images_per_s": "images per second, all ranks",
    "loss/instance": "loss: instance",
    "loss/prototype": "loss: prototype",
    "loss/weak": "loss: weak labels",
    "loss/crop": "loss: small crops",
    "lr": "learning rate",
    "gpu_memory_gb": "most GPU memory, GB",
    "health/std": "spread of the features (1: even, 0: one point)",
    "health/effective_rank": "effective rank of the features",
    "health/uniformity": "uniformity (lower: more even)",
    "health/alignment": "alignment of two views (0: the same)",
    "health/queue_age": "age of the oldest key in the queue, steps",
    "health/knn_top1": "kNN within the last batches, %",
}
_PARTS = {
    "time/data": "waiting for data",
    "time/augment": "augment",
    "time/forward": "forward",
    "time/loss": "loss",
    "time/backward": "backward",
    "time/communication": "communication",
}
_MINING = {
    "embed_seconds": "embedding",
    "index/kmeans_seconds": "k-means",
    "index/assign_seconds": "assignment",
    "index/density_seconds": "concentration",
    "index/neighbours_seconds": "neighbours",
}
"""Of a snapshot's seconds; the rest is waiting for the index and sending."""


def losses(run: Run) -> str:
    names = scalar_names(run.train)
    parts = [n for n in names if n.startswith("loss/")]
    total = Series("loss", points(run.train, "loss"))
    charts = [line_chart("loss", [total], "step", smooth=True)]
    if parts:
        series = [Series(n.removeprefix("loss/"), points(run.train, n)) for n in parts]
        charts.append(line_chart("parts of the loss", series, "step", smooth=True))
    others = [n for n in names if n not in _NOT_CURVES and not n.startswith(_ELSEWHERE)]
    charts += [_curve(n, points(run.train, n), smooth=True) for n in others]
    return grid(charts, "No loss yet.")


def _curve(name: str, found: Sequence[Point], smooth: bool = False) -> str:
    title = TITLES.get(name, name)
    return line_chart(title, [Series(title, found)], "step", smooth=smooth)


def schedules(run: Run) -> str:
    """Curves of what changes over the run; what stays the same is said in a sentence."""
    charts = [line_chart("learning rate", [Series("learning rate", points(run.train, "lr"))], "step")]
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


def clusters(run: Run) -> str:
    """How large the clusters of each clustering are: a table of the last snapshot, its sizes, and curves over the run."""
    sizes: dict[int, list[tuple[float, list[tuple[int, int]]]]] = {}
    scalars: dict[str, dict[int, list[Point]]] = {}
    for line in run.snapshots:
        for name, value in line.items():
            found = _CLUSTERING.fullmatch(name)
            if found is None:
                continue
            which, measure = int(found[1]), found[2]
            if measure == "sizes_histogram" and (pairs := _pairs(value)):
                sizes.setdefault(which, []).append((at(line), pairs))
            elif is_number(value):
                scalars.setdefault(measure, {}).setdefault(which, []).append((at(line), value))
    charts = [
        histogram(f"clustering {which}: sizes now", history[-1][1], "rows in a cluster", "clusters")
        for which, history in sorted(sizes.items())
    ]
    for which, history in sorted(sizes.items()):
        if len(history) > 1:
            lines = [
                Series(name, [(x, _quantile(pairs, share)) for x, pairs in history])
                for name, share in (("largest", 1.0), ("largest tenth", 0.9), ("median", 0.5), ("smallest", 0.0))
            ]
            charts.append(line_chart(f"clustering {which}: sizes over the run", lines, "step", "rows", log=True))
    for measure, by_clustering in scalars.items():
        moving = [which for which, found in by_clustering.items() if len({y for _, y in found}) > 1]
        if moving and measure != "largest":  # it is the uppermost line of the sizes
            lines = [Series(f"clustering {which}", found) for which, found in sorted(by_clustering.items())]
            charts.append(line_chart(measure, lines, "step"))
    charts.append(_mining_time(run))
    return _last_snapshot(run, sizes, scalars) + grid(charts, _NOTHING_MINED)


_NOTHING_MINED = "No snapshot: nothing was mined yet, or the method mines nothing."


def _last_snapshot(
    run: Run,
    sizes: Mapping[int, Sequence[tuple[float, list[tuple[int, int]]]]],
    scalars: Mapping[str, Mapping[int, list[Point]]],
) -> str:
    """A table: a line per clustering with its numbers in the last snapshot."""
    which = sorted({*sizes, *(w for found in scalars.values() for w in found)})
    if not which:
        return ""
    measures = list(scalars)
    head = "".join(
        f'<th class="n"><button type="button">{escape(m)}</button></th>'
        for m in ("clustering", "median size", *measures)
    )
    rows = []
    for w in which:
        median = f"{_quantile(sizes[w][-1][1], 0.5):,.0f}" if w in sizes else ""
        cells = [str(w), median]
        cells += [_cell(scalars[m][w][-1][1]) if w in scalars[m] else "" for m in measures]
        rows.append("".join(f'<td class="n" data-value="{c.replace(",", "")}">{c}</td>' for c in cells))
    last = run.snapshots[-1]
    took = f", which took {last['seconds']:,.1f} s" if is_number(last.get("seconds")) else ""
    said = f"The last of {len(run.snapshots)} snapshots, at step {at(last):,.0f}{took}."
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<p class="soft">{escape(said)}</p><div class="box scroll"><table class="sort"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _mining_time(run: Run) -> str:
    """The seconds of each snapshot by what took them."""
    lines = [line for line in run.snapshots if is_number(line.get("seconds"))]
    parts = [n for n in _MINING if any(line.get(n, 0) for line in lines if is_number(line.get(n)))]
    series = [Series(_MINING[n], [(at(line), float(line.get(n) or 0.0)) for line in lines]) for n in parts]
    rest = [(at(line), max(0.0, line["seconds"] - sum(line.get(n) or 0.0 for n in parts))) for line in lines]
    series.append(Series("sending and waiting" if parts else "whole snapshot", rest))
    return split_bar("time of the last snapshot", [(s.name, s.points[-1][1]) for s in series if s.points]) + (
        stacked_chart("time of a snapshot", series, "step", "seconds") if len(lines) > 1 else ""
    )


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


def health(run: Run) -> str:
    names = [n for n in scalar_names(run.train) if n.startswith("health/")]
    evenness = [n for n in names if n.startswith("health/cluster_evenness/")]
    charts = [_curve(n, points(run.train, n)) for n in names if n not in evenness]
    lines = [Series(f"clustering {n.rsplit('/', 1)[1]}", points(run.train, n)) for n in evenness]
    charts.append(line_chart("evenness of the clusters (1: all of one size)", lines, "step"))
    return grid(charts, "No feature health yet.")


def speed(run: Run) -> str:
    charts = []
    if found := points(run.train, "images_per_s"):
        title = "images per second, all ranks"
        charts.append(line_chart(title, [Series(title, found)], "step", smooth=True))
    named = [n for n in scalar_names(run.train) if n.startswith("time/") and n not in ("time/step", "time/mining")]
    parts = sorted(named, key=lambda n: list(_PARTS).index(n) if n in _PARTS else len(_PARTS))
    timed = [line for line in run.train if all(is_number(line.get(n)) for n in ("time/step", *parts))]
    advice = bar = ""
    if timed:
        series = [Series(_PARTS.get(n, n.removeprefix("time/")), points(timed, n, 1000.0)) for n in parts]
        rest = [(at(line), 1000.0 * max(0.0, line["time/step"] - sum(line[n] for n in parts))) for line in timed]
        series.append(Series("the rest of the step" if parts else "step", rest))
        means = [(s.name, statistics.fmean(y for _, y in s.points) / 1000.0) for s in series]
        if mined := [line["time/mining"] for line in timed if is_number(line.get("time/mining"))]:
            means.append(("mining, per step", sum(mined) / len(timed)))
        bar = split_bar("where the time goes, per step", means)
        charts.append(stacked_chart("time of a step", series, "step", "ms"))
        if "time/data" in parts:
            advice = advice_on(shares_of(timed, parts))
    return advice + grid([bar, *charts, _ranks(run)], "No timing yet.")


def _ranks(run: Run) -> str:
    """How much longer the slowest rank takes for its batch than the median one, and which it mostly is."""
    lines = [line for line in run.train if is_number(line.get("ranks/slowest_s"))]
    which = [int(line["ranks/slowest"]) for line in lines if is_number(line.get("ranks/slowest"))]
    if not which:
        return ""
    mostly = statistics.mode(which)
    title = f"time to a batch (slowest: rank {mostly}, {which.count(mostly) / len(which):.0%})"
    series = [
        Series("slowest rank", points(lines, "ranks/slowest_s", 1000.0)),
        Series("median rank", points(lines, "ranks/median_s", 1000.0)),
    ]
    return line_chart(title, series, "step", "ms", log=True)


def shares_of(timed: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> dict[str, float]:
    """The share of each part in a step, 0 to 1 (median of the lines), and of mining in the whole time (mean)."""
    steps = [line for line in timed if line["time/step"] > 0]
    if not steps:
        return {}
    shares = {n.removeprefix("time/"): statistics.median(line[n] / line["time/step"] for line in steps) for n in parts}
    mining = sum(line.get("time/mining", 0.0) for line in steps)
    shares["mining"] = mining / (mining + sum(line["time/step"] for line in steps))
    return shares


def advice_on(shares: Mapping[str, float]) -> str:
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
            f"You are bound by augmentation: {share('augment'):.0%} of a step makes views in the training process. Give "
            "data.workers or --data.loader ffcv, or a GPU."
        )
    if share("communication") > 0.2:
        found.append(
            f"You are network bound: {share('communication'):.0%} of a step waits for gradients of other ranks. Larger "
            "batches per rank, train.accumulate, or a faster network between the machines."
        )
    if share("mining") > 0.3:
        found.append(
            f"You are bound by mining: {share('mining'):.0%} of the time goes to embedding and clustering between epochs. "
            "Mine less often (method.refresh-epochs), from the last clusters (mining.init warm), beside training "
            "(mining.lag 1), or on more mining.shards."
        )
    if found:
        return "".join(f'<p class="box note warn">{escape(text)}</p>' for text in found)
    text = f"{share('data'):.0%} of a step is waiting for images: the network, not the data, sets the pace"
    if "forward" in shares:
        text += f" ({share('forward') + share('backward'):.0%} forward and backward, {share('loss'):.0%} loss)"
    return f'<p class="box note">{escape(text)}.</p>'


def grid(charts: Iterable[str], empty: str) -> str:
    drawn = "".join(charts)
    if drawn:
        return f'<div class="charts">{drawn}</div>'
    return nothing(empty) if empty else ""


def nothing(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
