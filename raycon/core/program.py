"""What the programs do around their work: one readable message for whatever goes wrong, and the exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from raycon.core.config import ConfigError

HINT = "--debug: where an error came from."


def run(name: str, work: Callable[[list[str]], int], argv: Sequence[str] | None, kept: str = "") -> int:
    """``work`` with the command line, without ``--debug``. Returns the exit status: its own, 2 for a wrong request, 130
    when a person stopped it (Ctrl-C).

    A ConfigError is a wrong request; RuntimeError, OSError, ValueError and ImportError are failures (1). Each is one
    message on standard error that begins with ``name``; with ``--debug`` it is raised. Other errors are our mistakes
    and always are. kept: a sentence for who was stopped or failed half-way: what is there, and how to go on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return work([a for a in arguments if a != "--debug"])
    except ConfigError as error:
        if debug:
            raise
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        if debug:
            raise
        more = f"{kept}\n" if kept else ""
        sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n{more}(--debug shows where)\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped. {kept}".rstrip() + "\n")
        return 130


def run_of(place: Path) -> Path | None:
    """The run directory that a path is or belongs to (one of its checkpoints/<step>), None when it is a file of weights."""
    for folder in (place, place.resolve().parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
