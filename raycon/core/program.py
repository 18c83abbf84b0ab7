"""What the programs do around their work: one readable message for whatever goes wrong, and the exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from raycon.core.config import ConfigError

HINT = "--debug: where an error came from."


def run(name: str, work: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """``work`` with the command line, without ``--debug``. Returns the exit status: its own, 2 for a wrong request.

    A ConfigError is a wrong request; RuntimeError, OSError, ValueError and ImportError are failures (1). Each is one
    message on standard error that begins with ``name``; with ``--debug`` it is raised. Other errors are our mistakes
    and always are.
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
        sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n(--debug shows where)\n")
        return 1
