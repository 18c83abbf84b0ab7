"""Floor 2: one file per method. A file in this folder *is* a registered method, found by its name.

The file holds the method's ``Options`` (a dataclass) and ``build``. Options are read from the source text so that
the command line can list them without importing torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import raycon.core.config as core_config
from raycon.core.config import ConfigError, MethodOptions, RunConfig, from_dict, read_tree

_FOLDER = Path(__file__).parent
_NOT_METHODS = {"__init__", "base"}


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(f.stem for f in _FOLDER.glob("*.py") if f.stem not in _NOT_METHODS)


def module(name: str) -> ModuleType:
    """The module of a method (imports torch). Raises ConfigError for an unknown name."""
    _check(name)
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def options(name: str) -> type[MethodOptions]:
    """The ``Options`` dataclass of a method, compiled from its source alone: torch is not imported.

    The class body may use the names of core/config.py (dataclass, field, Literal, Facts, Needs, the check words).
    Each field's docstring becomes its help text. Raises ConfigError for an unknown name.
    """
    _check(name)
    file = _FOLDER / f"{name}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Options"), None)
    if node is None:
        raise TypeError(f"{file} has no class Options(MethodOptions)")
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            help_text = ast.literal_eval(following.value)
            annotated = ast.parse(f"Annotated[0, arg(help={' '.join(help_text.split())!r})]", mode="eval").body
            assert isinstance(annotated, ast.Subscript)
            assert isinstance(annotated.slice, ast.Tuple)
            annotated.slice.elts[0] = statement.annotation
            statement.annotation = annotated
    namespace = _vocabulary() | {"__name__": f"{__name__}.{name}"}
    exec(
        compile(ast.fix_missing_locations(ast.Module([node], [])), str(file), "exec", dont_inherit=True), namespace
    )  # our source
    made = namespace["Options"]
    assert isinstance(made, type)
    assert issubclass(made, MethodOptions)
    return made


def configure(name: str, **values: Any) -> MethodOptions:
    """The options of a method with some values set. Raises ConfigError for a method or an option that is not there."""
    kind = options(name)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := [v for v in values if v not in known]:
        raise ConfigError([f"method {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"])
    return kind(**values)


def read_config(file: Path) -> RunConfig:
    """The configuration in a YAML file. Raises ConfigError when it is missing, no YAML, or names unknown options."""
    tree = read_tree(file)
    if not isinstance(tree, dict) or not isinstance(tree.get("method"), dict) or "name" not in tree["method"]:
        raise ConfigError([f"{file}: expected a configuration with method.name, as a run's config.yaml has it"])
    try:
        return from_dict(tree, options(str(tree["method"]["name"])))
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from None


def _vocabulary() -> dict[str, object]:
    """The names that an Options body may use: those of core/config.py and the few below."""
    from tyro.conf import arg

    return {k: v for k, v in vars(core_config).items() if not k.startswith("_")} | {
        "Annotated": typing.Annotated,
        "arg": arg,
    }


def _check(name: str) -> None:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError([f"method.name = {name!r}: no such method; {hint}There are: {', '.join(names())}"])
