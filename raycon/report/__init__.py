"""The report of a run: one self-contained HTML file. ``write(run_dir)``; ``python -m raycon.report RUN_DIR``."""

from raycon.report.comparison import compare
from raycon.report.live import Live
from raycon.report.page import write

__all__ = ["Live", "compare", "write"]
