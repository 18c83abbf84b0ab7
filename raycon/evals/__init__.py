"""Downstream evaluations of an encoder: constructor and ``run`` in, named numbers out. See base.py."""

from raycon.evals.base import (
    Evaluation,
    FeatureSets,
    Outcome,
    Source,
    Task,
    append_results,
    build,
    check,
    names,
    parse,
    read_results,
    run_all,
)

__all__ = [
    "Evaluation",
    "FeatureSets",
    "Outcome",
    "Source",
    "Task",
    "append_results",
    "build",
    "check",
    "names",
    "parse",
    "read_results",
    "run_all",
]
