"""Run the benchmarks and write docs/performance.md from what they measured: python -m benchmarks [NAME ...] [--quick]

Each runs in a process of its own, one after the other. Its rows are kept in benchmarks/results/NAME.json (NAME-gpu.json
where there is a GPU) with the versions, the machine and the date; the page shows whatever lies there, so a part can be
measured again, or on another machine, by itself. --page: write the page only.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "performance.md"
LIBRARIES = ("torch", "ray", "faiss-cpu", "faiss-gpu", "ffcv", "numpy", "numba", "lightly", "kornia", "scikit-learn")
APART = {"__init__", "__main__", "harness", "machines", "methods_fashion"}
"""methods_fashion measures accuracies, for an hour, and writes a page of its own."""
WHEN_NAMED = {"soak"}
"""What takes a quarter of an hour: run when it is named, kept and shown like the others."""


def names() -> list[str]:
    return sorted(file.stem for file in HERE.glob("*.py") if file.stem not in APART)


def by_itself() -> list[str]:
    """Those that run when none is named."""
    return [name for name in names() if name not in WHEN_NAMED]


def title(name: str) -> str:
    """The first sentence of a benchmark's description."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or name
    return text.splitlines()[0].split(": python -m")[0].rstrip(":.")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        found = [
            line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = found[0] if found else cpu
    gpu = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "python": platform.python_version(), "cpu": cpu, "cores": os.cpu_count(), "gpu": gpu} | {
        "versions": versions
    }


def measure(name: str, quick: bool, facts: dict[str, Any]) -> bool:
    """Run one benchmark and keep its rows, if it has come to any; False when it failed."""
    started = time.perf_counter()
    sys.stderr.write(f"--- {name}{' --quick' if quick else ''}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(rows), *(["--quick"] if quick else [])]
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if not rows.exists():
            sys.stderr.write(f"{name} ended with {status}: its earlier rows, if any, are kept\n")
            return False
        kept = facts | {
            "quick": quick,
            "seconds": round(time.perf_counter() - started),
            "rows": json.loads(rows.read_text()),
        }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}{'-gpu' if facts['gpu'] else ''}.json"
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return status == 0


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def section(file: Path) -> list[str]:
    """One benchmark's rows as Markdown."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    name = file.stem.removesuffix("-gpu")
    versions = ", ".join(f"{library} {version}" for library, version in kept["versions"].items())
    where = f"{kept['gpu']}, " if kept["gpu"] else ""
    lines = [
        f"## {title(name)}",
        "",
        f"`python -m benchmarks.{name}{' --quick' if kept['quick'] else ''}`, {kept['date']}, {kept['seconds']} s on {where}"
        f"{kept['cpu']}, {kept['cores']} cores; Python {kept['python']}, {versions}.",
        "",
        "| claim | ours | other | ratio | spread | target | holds | floor |",
        "|---|---:|---:|---:|---|---|---|---:|",
    ]
    for row in kept["rows"]:
        holds = ("yes" if row["holds"] else "**no**") if row["target"] else ""
        numbers = number(row["ours"]), number(row["other"]), number(row["ratio"])
        spread = " .. ".join(number(value) for value in row.get("spread") or ())
        claim = row["claim"].replace("|", "\\|")
        lines.append(
            f"| {claim} | {' | '.join(numbers)} | {spread} | {row['target']} | {holds} | {number(row['floor'])} |"
        )
    return [*lines, ""]


def page() -> str:
    files = sorted(RESULTS.glob("*.json"))
    lines = [
        "# Performance",
        "",
        "Written by `make bench` from what it measured; do not edit. A claim is a ratio of two sides measured in one run, "
        "interleaved, on the same threads; medians. *spread*: the smallest and the largest ratio of the turns, where these "
        "are measured in pairs. *floor*: the least the machine could take, where there is such a bound. "
        "A row without a target is a figure to know. What a large run would need is computed in "
        "[index-plan.md](index-plan.md) and by `python -m raycon.doctor --plan`; accuracies are in "
        "[results-fashion.md](results-fashion.md).",
        "",
    ]
    missed = [
        (file, r) for file in files for r in json.loads(file.read_text(encoding="utf-8"))["rows"] if not r["holds"]
    ]
    lines += [f"Targets missed: {len(missed)}." if missed else "No target is missed.", ""]
    lines += [f"- {file.stem}: {row['claim']} ({number(row['ratio'])}, target {row['target']})" for file, row in missed]
    for file in files:
        lines += ["", *section(file)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; none: all but {', '.join(WHEN_NAMED)}"
    )
    parser.add_argument("--quick", action="store_true", help="each within 4 minutes on 2 cores")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured before")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(names())):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    failed = []
    if not args.page:
        facts = machine()
        failed = [name for name in args.names or by_itself() if not measure(name, args.quick, facts)]
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"{PAGE}\n" + (f"failed: {', '.join(failed)}\n" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
