"""What all benchmarks share: interleaved measuring, rows of claims, a table and a JSON file.

A claim is a ratio of two sides measured in one run, in one process tree and on the same threads, in turns, so that
whatever else the machine does hits both. Medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured claim."""

    claim: str
    ours: float
    other: float
    ratio: float
    """ours / other."""
    target: str
    """What ``ratio`` is held against, "<= 1.15" say."""
    holds: bool
    floor: float | None
    """The least the machine could take (same unit as ``ours``), where there is such a bound."""
    spread: tuple[float, float] | None = None
    """The smallest and the largest ratio of the turns, where they were measured in pairs."""


def at_most(claim: str, ours: float, other: float, limit: float, floor: float | None = None) -> Row:
    """The claim that ours / other <= limit."""
    ratio = ours / other
    return Row(
        claim=claim, ours=ours, other=other, ratio=ratio, target=f"<= {limit:.4g}", holds=ratio <= limit, floor=floor
    )


def at_least(claim: str, ours: float, other: float, limit: float, floor: float | None = None) -> Row:
    """The claim that ours / other >= limit."""
    ratio = ours / other
    return Row(
        claim=claim, ours=ours, other=other, ratio=ratio, target=f">= {limit:.4g}", holds=ratio >= limit, floor=floor
    )


def between(claim: str, ours: float, other: float, low: float, high: float) -> Row:
    """The claim that low <= ours / other <= high: a prediction against what it predicts."""
    ratio = ours / other
    target = f"{low:.4g} .. {high:.4g}"
    return Row(claim=claim, ours=ours, other=other, ratio=ratio, target=target, holds=low <= ratio <= high, floor=None)


def paired(row: Row, ours: Sequence[float], other: Sequence[float]) -> Row:
    """The same claim with the smallest and the largest ratio of the turns, which were measured in pairs."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    return replace(row, spread=(min(ratios), max(ratios)))


def shown(claim: str, ours: float, other: float, floor: float | None = None) -> Row:
    """A measured pair that nothing is promised of."""
    ratio = ours / other if other else float("nan")
    return Row(claim=claim, ours=ours, other=other, ratio=ratio, target="", holds=True, floor=floor)


def interleave(
    sides: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """The median seconds of each side, run in turns ``repeats`` times after one unmeasured turn.

    ``clock``: time.process_time (CPU seconds of this process: right for one thread on a machine with other work), or
    time.perf_counter (wall) where several processes or threads work.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [("claim", "ours", "other", "ratio", "spread", "target", "holds", "floor")]
    for row in rows:
        floor = "" if row.floor is None else f"{row.floor:.4g}"
        holds = "" if not row.target else "yes" if row.holds else "NO"
        numbers = (f"{row.ours:.4g}", f"{row.other:.4g}", f"{row.ratio:.4g}")
        spread = "" if row.spread is None else f"{row.spread[0]:.4g} .. {row.spread[1]:.4g}"
        cells.append((row.claim, *numbers, spread, row.target, holds, floor))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells) + "\n"


def main(doc: str, measure: Callable[[bool], list[Row]], argv: list[str] | None = None) -> list[Row]:
    """The program of a benchmark: ``measure(quick)`` to rows, to a table on stdout and, with --json, to a file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: within 4 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    args = parser.parse_args(argv)
    rows = measure(args.quick)
    sys.stdout.write(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return rows
