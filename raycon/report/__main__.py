"""``python -m raycon.report RUN_DIR``: write (again) the report.html of a run, finished or not.

``python -m raycon.report RUN_DIR RUN_DIR ...``: one page that compares them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from raycon.core import program
from raycon.core.config import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 written, 1 the page could not be written, 2 the request was wrong."""
    return program.run("raycon.report", answer, arguments)


def answer(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m raycon.report",
        description="Write the report of a run, or with several runs a page that compares them. Opens offline.",
        epilog=program.HINT,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run directory (with config.yaml, metrics.jsonl, ...)")
    parser.add_argument(
        "--out", type=Path, help="of several runs: the page (default: comparison.html beside the first run)"
    )
    parser.add_argument("--rows", type=int, default=0, help="images to embed for map, clusters and neighbours")
    parser.add_argument("--light", action="store_true", help="without the pictures that need the checkpoint")
    asked = parser.parse_args(arguments)
    problems = [
        f"{folder} is not a run directory (no {' nor '.join(_SIGNS)} in it): give one that raycon.pretrain made"
        for folder in asked.run_dir
        if not any((folder / sign).is_file() for sign in _SIGNS)
    ]
    if asked.rows < 0 or 0 < asked.rows < 30:
        problems.append(f"--rows {asked.rows}: give 30 or more (0: as many as are quick)")
    if asked.out is not None and len(asked.run_dir) == 1:
        problems.append("--out is for several runs; the report of one run is its report.html")
    if asked.out is not None and asked.out.is_dir():
        problems.append(f"--out {asked.out} is a directory: give a file name")
    if problems:
        raise ConfigError(problems)
    from raycon import report

    if len(asked.run_dir) == 1:
        file = report.write(asked.run_dir[0], gather=not asked.light, rows=asked.rows)
    else:
        file = report.compare(asked.run_dir, asked.out or asked.run_dir[0].resolve().parent / "comparison.html")
    sys.stdout.write(f"{file.resolve()}\n")
    return 0


_SIGNS = ("config.yaml", "metrics.jsonl")


if __name__ == "__main__":
    sys.exit(main())
