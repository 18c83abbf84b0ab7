"""The floors of the house: imports go down only, and each dependency stays in its folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "raycon/core": 0,
    "raycon/nn": 1,
    "raycon/index": 1,
    "raycon/index/__main__.py": 5,
    "raycon/methods": 2,
    "raycon/training": 3,
    "raycon/evals": 3,
    "raycon/report": 3,
    "raycon/recipes": 3,
    "data_loaders": 3,
    "raycon/on_ray": 4,
    "data_loaders/ray_data.py": 4,
    "raycon": 5,
    "tuning": 5,
    "cluster": 5,
}
FILES = sorted(p for top in ("raycon", "data_loaders", "tuning", "cluster") for p in (ROOT / top).rglob("*.py"))


def floor_of(path: str) -> int:
    """The floor of a file or folder, by its longest matching place."""
    place = max((p for p in FLOORS if path == p or path.startswith(p + "/")), key=len)
    return FLOORS[place]


def module_path(module: str) -> str | None:
    """raycon.data_loaders.ffcv -> data_loaders/ffcv.py; None for what is not ours."""
    if module == "raycon":
        return "raycon/core"  # the package itself: a name and a version
    parts = module.split(".")
    if parts[0] != "raycon":
        return None
    base = Path(*parts[1:]) if parts[1] in ("data_loaders", "tuning", "cluster") else Path(*parts)
    return str(base.with_suffix(".py") if (ROOT / base).with_suffix(".py").is_file() else base)


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, whether at import time of the file) of every import in a file, relative ones resolved."""
    package = (
        ["raycon", *file.relative_to(ROOT).parent.parts]
        if file.parts[len(ROOT.parts)] != "raycon"
        else [*file.relative_to(ROOT).parent.parts]
    )
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(n) for n in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name, id(node) in top) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from raycon.core import dist` imports raycon.core.dist
                whole = f"{module}.{alias.name}"
                path = module_path(whole) if module.split(".")[0] == "raycon" else None
                found.append((whole if path and (ROOT / path).exists() else module, id(node) in top))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    relative = str(file.relative_to(ROOT))
    own = floor_of(relative)
    for module, _ in imports(file):
        path = module_path(module)
        if path is not None:
            assert floor_of(path) <= own, f"{relative} (floor {own}) imports {module} (floor {floor_of(path)})"
            if own == 3 and path.split("/")[0] == "data_loaders":
                assert relative.startswith("data_loaders"), f"{relative} imports {module}: find loaders by name"
            if relative.startswith("raycon/methods/") and path.startswith("raycon/methods/"):
                assert path.endswith(("base.py", "methods")), f"{relative} imports another method, {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_stay_in_their_rooms(file: Path) -> None:
    relative = str(file.relative_to(ROOT))
    for module, at_top in imports(file):
        name = module.split(".")[0]
        if name == "ray":
            assert floor_of(relative) >= 4, f"{relative} imports ray below floor 4"
        if name in ("faiss", "ffcv", "wandb", "matplotlib", "sklearn", "scipy", "timm"):
            assert not at_top, f"{relative} imports {name} when it is imported; import it where it is used"


def test_pure_files() -> None:
    """Losses and k-means import nothing of raycon but the central types."""
    for name in ("raycon/nn/losses.py", "raycon/index/kmeans.py"):
        for module, _ in imports(ROOT / name):
            path = module_path(module)
            assert path is None or path in ("raycon/core/types.py",) or path.startswith("raycon/index"), (name, module)


def test_no_forbidden_words() -> None:
    """No device hard-coded, no star imports, no globals, functions that a person can read."""
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Call):
                raise AssertionError(f"{where}: .cuda()")
            if isinstance(node, ast.ImportFrom):
                assert all(a.name != "*" for a in node.names), f"{where}: star import"
            assert not isinstance(node, ast.Global), f"{where}: global"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno <= 130, f"{where}: {node.name} is longer than 130 lines"
