"""Where images lie: folders and addresses, what is in them, and names that may not lead out of them.

Names of files are bytes, as the file system has them, in NumPy arrays: a million of them are one object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

_LONGEST = 4096
"""Letters of a path, as Linux has it; all paths of a data set take the room of its longest."""
ENDINGS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".ppm", b".pgm", b".tif", b".tiff")


class Group(NamedTuple):
    """The images below one sub-folder, or those right inside the folder (name b"")."""

    name: bytes
    files: NDArray[np.bytes_]
    """Sorted, relative to the sub-folder."""
    size: NDArray[np.int64] | None
    """Bytes of each, where the listing told them."""


def is_remote(root: object) -> bool:
    """Whether ``root`` is an address (scheme://...) rather than a folder."""
    return isinstance(root, str) and "://" in root


def file_system(address: str) -> Any:
    """fsspec's file system of an address. Raises ConfigError when its library is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)[0]
    except (ImportError, ValueError) as error:
        raise ConfigError([f"{address}: cannot be opened ({error})"]) from error


def read_bytes(file: Path | str) -> bytes:
    """A whole file, local or remote. Raises ConfigError naming it when it cannot be read."""
    try:
        if isinstance(file, Path):
            return file.read_bytes()
        data = file_system(file).cat_file(file)
        assert isinstance(data, bytes)
        return data
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})"]) from error


def read_lines(file: Path | str) -> list[str]:
    """The lines of a text file without their ends, blank ones left out. Raises ConfigError naming the file."""
    try:
        return [line for line in read_bytes(file).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: not a text file ({error})"]) from error


def groups(folder: Path | str) -> list[Group]:
    """What images are below ``folder``: first those right inside (when there are any), then per sub-folder, sorted.

    Sub-folders of sub-folders belong to their group; hidden files and folders (.name) are left out, and files without
    an image's ending. A sub-folder without images is an empty group. Raises ConfigError when it cannot be listed.
    """
    try:
        return _local_groups(os.fsencode(folder)) if isinstance(folder, Path) else _remote_groups(folder)
    except OSError as error:
        raise ConfigError([f"{folder}: cannot be listed ({getattr(error, 'strerror', None) or error})"]) from error


def _local_groups(base: bytes) -> list[Group]:
    with os.scandir(base) as entries:
        seen = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith(b"."))
    loose = _array(name for name, is_folder in seen if not is_folder and _is_image(name))
    found = [Group(b"", loose, None)] if len(loose) else []
    for name, is_folder in seen:
        if is_folder:
            inside: list[bytes] = []
            status = os.stat(os.path.join(base, name))
            _collect(os.path.join(base, name), b"", inside, {(status.st_dev, status.st_ino)})
            found.append(Group(name, _array(sorted(inside)), None))
    return found


def _collect(folder: bytes, prefix: bytes, inside: list[bytes], above: set[tuple[int, int]]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if _is_image(entry.name):
                inside.append(prefix + entry.name)
            elif entry.is_dir():
                status = entry.stat()
                here = (status.st_dev, status.st_ino)
                if here not in above:  # else a link back up
                    _collect(entry.path, prefix + entry.name + b"/", inside, above | {here})


def _remote_groups(folder: str) -> list[Group]:
    system = file_system(folder)
    base = system._strip_protocol(folder).rstrip("/")
    per_group: dict[bytes, list[tuple[bytes, int]]] = {}
    for path, info in system.find(base, detail=True).items():
        relative = path[len(base) :].lstrip("/").encode()
        if _is_image(relative) and not any(part.startswith(b".") for part in relative.split(b"/")):
            name, slash, rest = relative.partition(b"/")
            per_group.setdefault(name if slash else b"", []).append(
                (rest if slash else relative, -1 if info.get("size") is None else int(info["size"]))
            )
    found = []
    for name, members in sorted(per_group.items()):
        members.sort()
        size = np.array([size for _, size in members], dtype=np.int64)
        found.append(Group(name, _array(file for file, _ in members), size if (size >= 0).all() else None))
    return found


def _is_image(name: bytes) -> bool:
    return name.lower().endswith(ENDINGS)


def _array(names: Iterable[bytes]) -> NDArray[np.bytes_]:
    return np.array(list(names), dtype=np.bytes_)


def join(parts: Sequence[Group]) -> tuple[NDArray[np.bytes_], NDArray[np.int64] | None]:
    """All files of several groups, relative to the folder that was listed, and their sizes when all are known."""
    widths = [len(g.name) + 1 + g.files.dtype.itemsize for g in parts if len(g.files)]
    files = np.empty(sum(len(g.files) for g in parts), dtype=f"S{max(widths, default=1)}")
    at = 0
    for group in parts:
        prefix = group.name + b"/" if group.name else b""
        files[at : at + len(group.files)] = np.char.add(prefix, group.files) if prefix else group.files
        at += len(group.files)
    sizes = [g.size for g in parts if g.size is not None]
    return files, np.concatenate(sizes) if sizes and len(sizes) == len(parts) else None


def is_folder(folder: Path | str) -> bool:
    return folder.is_dir() if isinstance(folder, Path) else bool(file_system(folder).isdir(folder))


def is_file(file: Path | str) -> bool:
    return file.is_file() if isinstance(file, Path) else bool(file_system(file).isfile(file))


def inside(folder: Path | str, *parts: str) -> Path | str:
    """``folder / parts``, for folders and addresses."""
    return folder.joinpath(*parts) if isinstance(folder, Path) else "/".join((folder, *parts))


def place_of(name: str) -> Path | str:
    """A file or folder as a user names it: an address as it is, else an absolute path."""
    return name.rstrip("/") if is_remote(name) else Path(name).expanduser().absolute()


def below(name: str, root: Path | str, where: str) -> bytes:
    """A path from a list, relative to ``root``. Raises ConfigError naming ``where`` when it leads out of ``root``."""
    base = f"{root}/"
    relative = name[len(base) :] if name.startswith(base) else name
    if is_remote(relative):
        raise ConfigError([f"{where}: {name!r} is not below data.root = '{root}'; give paths below it"])
    if "/" not in relative:  # a list that was made on Windows
        relative = relative.replace("\\", "/")
    relative = os.path.normpath(relative) if relative else ""
    if not relative or relative == "." or "\0" in relative:
        raise ConfigError([f"{where}: {name!r} is not the path of an image"])
    if len(relative) > _LONGEST:
        raise ConfigError(
            [f"{where}: a path of {len(relative)} letters ({relative[:40]!r}...): give one an image can have"]
        )
    if relative.startswith("/") or relative.split("/")[0] == "..":
        raise ConfigError([f"{where}: {name!r} leads out of data.root = '{root}'; give paths below it"])
    return os.fsencode(relative)


def local_stats(base: bytes, files: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(N,) bytes (-1 for a file that is gone) and (N,) time of change in ns of files below ``base``."""
    size = np.full(len(files), -1, dtype=np.int64)
    changed = np.zeros(len(files), dtype=np.int64)
    prefix = os.path.join(base, b"")
    for row, name in enumerate(files):
        try:
            status = os.stat(prefix + name)
        except OSError:
            continue
        size[row], changed[row] = status.st_size, status.st_mtime_ns
    return size, changed


def folder_labels(names: Sequence[bytes], classes: Sequence[str], where: str) -> NDArray[np.int64]:
    """(N,) the class whose folder each path begins with. Raises ConfigError naming one that is of none."""
    number = {os.fsencode(name): i for i, name in enumerate(classes)}
    label = [number.get(name.split(b"/", 1)[0], -1) for name in names]
    if -1 in label:
        raise ConfigError([f"{where}: {os.fsdecode(names[label.index(-1)])!r} is in no class folder; fetch it again"])
    return np.array(label, dtype=np.int64)
