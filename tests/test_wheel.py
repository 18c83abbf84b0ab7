"""The wheel, built, installed elsewhere and imported whole: what is installed is what the checkout has."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")  # a pure wheel: unpacking is installing
    return folder / "site"


def run(site: Path, code: str) -> str:
    """Run Python elsewhere, with the unpacked wheel ahead of the checkout."""
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_raycon_is_installed(installed: Path) -> None:
    top = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert top == {"raycon"}


def test_every_file_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    for folder in ("raycon", "data_loaders", "tuning", "cluster"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".csv", ".json", ".html", ".typed") and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT) if folder == "raycon" else Path("raycon") / file.relative_to(ROOT)
                assert (installed / inside).is_file(), inside


def test_every_module_imports_from_the_wheel(installed: Path) -> None:
    code = f"""
import importlib, pkgutil, raycon
names = [m.name for m in pkgutil.walk_packages(raycon.__path__, "raycon.") if not m.name.endswith("__main__")]
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(installed)!r}), module.__file__
print(len(names))
"""
    assert int(run(installed, code)) > 40


def test_the_ground_floor_is_light(installed: Path) -> None:
    """Without Ray, faiss, FFCV, wandb: a method is built and its recipes listed."""
    code = """
import sys
for name in ("ray", "faiss", "ffcv", "wandb", "matplotlib", "scipy"):
    sys.modules[name] = None  # importing it now fails
import raycon.pretrain, raycon.training.job, raycon.evals, raycon.report
from raycon import methods, recipes
from raycon.index.local import LocalIndex
assert "quickstart" in recipes.recipes() and methods.module("pcl")
"""
    run(installed, code)
