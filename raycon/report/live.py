"""The report while a run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycon.report.page import write

logger = logging.getLogger("raycon")


class Live:
    """Implements core.log.Display: writes report.html again after snapshots, evaluations and epochs' ends.

    At most every ``every_s`` seconds, and never with the pictures that need the checkpoint (those are made at the end).
    The time it takes is kept below a hundredth of the run's.
    """

    def __init__(self, run_dir: Path, every_s: float = 60.0) -> None:
        self._run_dir, self._every_s = run_dir, every_s
        self._next = time.monotonic() + every_s / 4

    def show(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if record["kind"] in ("state", "start") or now < self._next:
            return
        try:
            write(self._run_dir)
        except (ValueError, OSError) as error:  # a full disk, say: the run must not care
            logger.warning("report.html could not be written: %s", error)
        self._next = time.monotonic() + max(self._every_s, 100 * (time.monotonic() - now))

    def close(self) -> None:
        pass
