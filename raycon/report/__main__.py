"""``python -m raycon.report RUN_DIR [RUN_DIR ...]``: write (again) the report.html of runs, finished or not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raycon import report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m raycon.report", description="Write the report.html of runs.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run directory (with config.yaml, metrics.jsonl, ...)")
    for run_dir in parser.parse_args(arguments).run_dir:
        try:
            file = report.write(run_dir)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
        sys.stdout.write(f"{file.resolve()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
