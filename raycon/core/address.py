"""Run directories that are an address (s3://bucket/runs/first) rather than a folder: what is one, and where it is worked on."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
from pathlib import Path

from raycon.core.config import ConfigError

WORK = "RAYCON_WORK"
"""Environment: where working folders are (default ~/.cache/raycon/runs)."""
LIBRARIES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def is_address(place: str) -> bool:
    """scheme://... rather than a folder."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place) is not None


def address_problems(address: str, option: str = "run.dir", elsewhere: bool = False) -> list[str]:
    """What is wrong with an address, without asking the store. ``elsewhere``: this machine need not be able to open it."""
    scheme, _, rest = address.partition("://")
    if "@" in rest.split("/")[0] or "?" in rest:
        return [f"{option}: an address holds no keys (they would stand in config.yaml); set them in the environment of the "
                "machines (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...)"]  # fmt: skip
    if not rest.strip("/"):
        return [f"{option} = {address!r}: give {scheme}://BUCKET/FOLDER"]
    if elsewhere:
        return []
    library = LIBRARIES.get(scheme)
    if library and importlib.util.find_spec(library) is None:
        return [f"{option} = {address!r}: {library} is not installed; pip install 'raycon[remote]'"]
    if importlib.util.find_spec("fsspec") is None:
        return [f"{option} = {address!r}: fsspec is not installed; pip install 'raycon[remote]'"]
    import fsspec

    if scheme not in fsspec.available_protocols():
        return [f"{option} = {address!r}: fsspec knows no {scheme}://; give a folder, or s3://, gs://"]
    return []


def working_folder(address: str) -> Path:
    """The folder of this machine that a run at an address works in."""
    root = Path(os.environ.get(WORK) or Path.home() / ".cache" / "raycon" / "runs").expanduser().absolute()
    address = address.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9=._-]+", "_", address.rsplit("/", 1)[-1]).lstrip("-_.") or "run"
    return root / f"{name[-80:]}-{hashlib.sha256(address.encode()).hexdigest()[:10]}"


def place_of(text: str) -> Path:
    """Where a run directory that is given as ``text`` lies on this machine."""
    return working_folder(text) if is_address(text) else Path(text).expanduser().resolve()


def fetched(place: str, small: bool = False) -> Path:
    """A place that a program was given, as a path: what is at an address is brought to this machine first.

    A run with its newest checkpoint, or one checkpoint of it; ``small``: all runs at or below it, without checkpoints.
    Raises ConfigError when there is none, or the address cannot be used.
    """
    if not is_address(place):
        return Path(place)
    storage = importlib.import_module("raycon.training.storage")  # by name: this floor does not depend on that one
    try:
        found: Path = storage.listed(place) if small else storage.here(place)
    except storage.StorageError as error:
        raise ConfigError([str(error)]) from error
    return found
