"""Data sets, and the loaders that turn them into batches: three of them, one stream.

``open_loader`` is the only door. A loader is found by its name, so that nothing of FFCV or Ray is imported before it is
chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING

from raycon.core.config import ConfigError

if TYPE_CHECKING:
    from raycon.core.types import LoaderPlan

    from .common import StreamLoader
    from .datasets import ImageSet

log = logging.getLogger(__name__)

LOADERS = {
    "ffcv": ("ffcv", "FfcvLoader"),
    "ray": ("ray_data", "RayDataLoader"),
    "torch": ("torch_loader", "TorchLoader"),
}
"""Per ``data.loader`` the module and the class."""


def open_loader(kind: str, dataset: ImageSet, plan: LoaderPlan) -> StreamLoader:
    """The loader ``kind`` (ffcv, ray, torch, or auto: ffcv where it can be imported, else torch).

    ``.kind`` of the result says which it is. Raises ConfigError for an unknown kind, a loader whose library is not
    installed, and a plan the data cannot serve.
    """
    if kind == "auto":
        if importlib.util.find_spec("ffcv") is None:
            return open_loader("torch", dataset, plan)
        try:
            return open_loader("ffcv", dataset, plan)
        except _Absent as problem:
            log.warning("%s; using the torch loader", problem.problems[0])
            return open_loader("torch", dataset, plan)
    if kind not in LOADERS:
        raise ConfigError([f"data.loader = {kind!r}: there are auto, {', '.join(LOADERS)}"])
    if plan.nodes and kind != "ray":
        log.warning("data.nodes = %r has no effect: only the ray loader reads on other nodes", plan.nodes)
    module, name = LOADERS[kind]
    try:
        loader = getattr(importlib.import_module(f".{module}", __name__), name)(dataset, plan)
    except ImportError as error:
        raise _Absent([f"data.loader = {kind!r}: {error}"]) from error
    assert isinstance(loader.kind, str)
    return loader  # type: ignore[no-any-return]


class _Absent(ConfigError):
    """The loader's library cannot be imported."""
