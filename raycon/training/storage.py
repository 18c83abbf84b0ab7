"""Runs at an address that fsspec opens (s3://bucket/runs/first, gs://..., file://...): where no file system is shared.

Every process works in a folder of its own machine (``working_folder``), laid out as any run directory; the address is
the truth, and outlives the machines:

    checkpoints/<step>/...    sent by rank 0 when they are complete here, state.json last: without it there is none
    everything else           sent by the process that leads the run, a few seconds after it changed
    .held                     who leads the run, renewed while it lives

Who goes on fetches the newest checkpoint whose sizes and SHA-256 are those of its state.json. Keys to a store come from
the environment of the machines, as its own tools want them; an address never holds any.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from raycon.core.address import LIBRARIES, address_problems, is_address, working_folder
from raycon.core.config import ConfigError, RunConfig
from raycon.training import checkpoint
from raycon.training.checkpoint import STATE, CheckpointError

logger = logging.getLogger("raycon")

T = TypeVar("T")

HELD = ".held"
RENEW_S = 15.0
EXPIRE_S = 60.0
"""A run whose leader has not renewed ``.held`` for so long is free."""
WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Pauses between tries of an operation that fails."""
LOOK_S = 1.0
SEND_S = 5.0
BYTES_PER_S = 2e5
"""A file that changes all the time (metrics.jsonl) is sent at most so often that this is its mean rate."""
_OWN = ("wandb", "tensorboard")
"""Folders that rank 0 writes; everything else is the leader's."""


class StorageError(RuntimeError):
    """A store that does not do what is asked of it; the message names the address and the cause."""


def of(config: RunConfig) -> Store | None:
    """The store of a run; None when its directory is a folder."""
    return Store(config.run.dir) if is_address(config.run.dir) else None


class Store:
    """The files at an address. Names are relative to it, with "/". Raises ConfigError for an address that cannot be used."""

    def __init__(self, address: str) -> None:
        if problems := address_problems(address):
            raise ConfigError(problems)
        import fsspec

        self.address = address.rstrip("/")
        self.system, root = fsspec.core.url_to_fs(self.address)
        self.root = root.rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _tried(self, what: str, work: Callable[[], T], answer: bool = True) -> T:
        """``work()``, again and again while the store is ill. Raises StorageError, FileNotFoundError if that is an answer."""
        for wait in (*WAITS_S, None):
            try:
                return work()
            except Exception as error:
                if answer and isinstance(error, FileNotFoundError):
                    raise
                if wait is None or isinstance(error, (PermissionError, FileNotFoundError)):
                    text = f"{self.address}: {what} failed ({type(error).__name__}: {error})"
                    raise StorageError(text) from error
                logger.warning("%s: %s failed (%s: %s); once more in %g s", self.address, what, type(error).__name__,
                               error, wait)  # fmt: skip
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _make_folder(self, name: str) -> None:
        if (
            self.address.partition("://")[0] not in LIBRARIES
        ):  # object stores have no folders; a bucket is not ours to make
            self.system.makedirs(self._at(name).rsplit("/", 1)[0], exist_ok=True)

    def put(self, file: Path, name: str) -> None:
        """Send a file."""

        def send() -> None:
            self._make_folder(name)
            self.system.put_file(str(file), self._at(name))

        self._tried(f"writing {name}", send, answer=False)

    def put_bytes(self, data: bytes, name: str) -> None:
        def send() -> None:
            self._make_folder(name)
            self.system.pipe_file(self._at(name), data)

        self._tried(f"writing {name}", send, answer=False)

    def get(self, name: str) -> bytes | None:
        """The content of a file, None when there is no such."""
        try:
            data: bytes = self._tried(f"reading {name}", lambda: self.system.cat_file(self._at(name)))
            return data
        except FileNotFoundError:
            return None

    def fetch(self, name: str, file: Path) -> None:
        """Copy a file to this machine; it appears there only when it is whole. Raises FileNotFoundError."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            self._tried(f"reading {name}", lambda: self.system.get_file(self._at(name), str(part)))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        def look() -> bool:
            self.system.invalidate_cache()
            return bool(self.system.exists(self._at(name)))

        return self._tried(f"looking for {name}", look)

    def delete(self, name: str) -> None:
        """Delete a file; fine when there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(f"deleting {name}", lambda: self.system.rm_file(self._at(name)))

    def names(self, below: str = "") -> list[str]:
        """All files below a folder, sorted."""

        def look() -> list[str]:
            self.system.invalidate_cache()
            try:
                return [str(path) for path in self.system.find(self._at(below))]
            except (FileNotFoundError, NotADirectoryError):
                return []

        root = self.root.lstrip("/") + "/"
        return sorted(path.lstrip("/").removeprefix(root) for path in self._tried(f"listing {below or 'it'}", look))

    # --- checkpoints ---

    def steps(self) -> list[str]:
        """The names of the complete checkpoints, oldest first."""
        found = [re.fullmatch(rf"checkpoints/(\d+)/{re.escape(STATE)}", name) for name in self.names("checkpoints")]
        return sorted(match[1] for match in found if match)

    def send_checkpoint(self, path: Path) -> None:
        """``path`` is a complete checkpoint; it is one there, too, only when all of it has arrived."""
        place = f"checkpoints/{path.name}"
        self.delete(f"{place}/{STATE}")
        for file in sorted(f for f in path.iterdir() if f.name != STATE):
            self.put(file, f"{place}/{file.name}")
        self.put(path / STATE, f"{place}/{STATE}")

    def fetch_checkpoint(self, name: str, folder: Path) -> Path:
        """``folder/<name>``, verified; fetched unless it is there already. One process of a machine fetches, others wait.

        Raises CheckpointError when it is incomplete or damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        target, place = folder / name, f"checkpoints/{name}"
        with open(folder / ".fetching", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.get(f"{place}/{STATE}")
            if state is None:
                raise CheckpointError(f"{self.address}/{place}: no {STATE}")
            if target.is_dir():
                with contextlib.suppress(OSError, CheckpointError):
                    if (target / STATE).read_bytes() == state:
                        checkpoint.load(target)
                        return target
                shutil.rmtree(target)
            try:
                files = [Path(name).name for name in json.loads(state)["files"]]
            except (ValueError, LookupError, TypeError):
                raise CheckpointError(f"{self.address}/{place}/{STATE}: unreadable") from None
            part = folder / f".{name}.{os.getpid()}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                for file in files:
                    self.fetch(f"{place}/{file}", part / file)
                (part / STATE).write_bytes(state)
                checkpoint.load(part)
                os.replace(part, target)
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.address}/{place}: {error} is missing") from None
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(part), f"{self.address}/{place}")) from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return target

    def fetch_newest(self, folder: Path) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that can be read, here; None when there is none. And what was wrong with newer ones."""
        refused: list[str] = []
        for name in reversed(self.steps()):
            try:
                return self.fetch_checkpoint(name, folder), refused
            except CheckpointError as error:
                refused.append(str(error))
        return None, refused

    def prune(self, keep: int) -> None:
        """As checkpoint.prune: those beyond the last and ``keep`` more, unless they wait for their evaluation."""
        for name in self.steps()[: -keep - 1] if keep else []:
            if not self.waits(name):
                self.delete(f"checkpoints/{name}/{STATE}")  # first: what is left then is no checkpoint
                for file in self.names(f"checkpoints/{name}"):
                    self.delete(file)

    def waits(self, name: str) -> bool:
        """Does this checkpoint wait for its evaluation?"""
        try:
            state = json.loads(self.get(f"checkpoints/{name}/{STATE}") or b"")
            return bool(state["evaluate"]) and not self.evaluated(state["step"])
        except (ValueError, LookupError, TypeError):
            return False

    def owed(self) -> list[str]:
        """As checkpoint.owed."""
        return [name for name in self.steps() if self.waits(name)]

    def evaluated(self, step: int) -> bool:
        """Has the checkpoint of this step been evaluated, as far as the leader has sent?"""
        data = self.get("evaluations.json")
        return data is not None and any(e["step"] == step and "control" not in e for e in json.loads(data))

    # --- who leads ---

    def holder(self) -> tuple[str, float]:
        """Who leads the run ("" for nobody), and for how many seconds that still counts without a renewal."""
        data = self.get(HELD)
        try:
            found = json.loads(data or b"{}")
            left = float(found["time"]) + EXPIRE_S - time.time()
            return (str(found["who"]), left) if left > 0 else ("", 0.0)
        except (ValueError, LookupError, TypeError):
            return "", 0.0


# --- a run here and there ---------------------------------------------------------------------------------------


def fetch_run(store: Store, folder: Path, checkpoints: bool = False) -> Path:
    """Bring the small files of a run here (what is here already goes), and its newest checkpoint. Returns ``folder``.

    Raises ConfigError when there is no run at the address.
    """
    names = [n for n in store.names() if not n.startswith(("checkpoints/", *(f"{own}/" for own in _OWN)))]
    if "config.yaml" not in names:
        raise ConfigError([f"{store.address}: holds no run (no config.yaml)"])
    _clear(folder, store.steps())
    for name in names:
        if not _inside(name):
            logger.warning("warning: %s/%s: such a name is not fetched", store.address, name)
        elif not Path(name).name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                store.fetch(name, folder / name)
    if checkpoints:
        _, refused = store.fetch_newest(folder / "checkpoints")
        for text in refused:
            logger.warning("warning: a damaged checkpoint was passed over: %s", text)
    return folder


def _inside(name: str) -> bool:
    """A name from a store may not lead out of the folder."""
    return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name


def _clear(folder: Path, steps: list[str]) -> None:
    """Empty a working folder; checkpoints that are at the address too may stay (they are compared when they are used)."""
    if not folder.is_dir():
        return
    for place in folder.iterdir():
        if place.name in ("checkpoints", ".lock"):
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink()
    for path in (folder / "checkpoints").glob("*"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.name not in steps:
            shutil.rmtree(path)


def here(place: str) -> Path:
    """A place that a program was given: itself, or what is at an address, fetched: a run, or one checkpoint of it.

    Raises ConfigError when there is nothing to be used.
    """
    if not is_address(place):
        return Path(place)
    match = re.fullmatch(r"(.+)/checkpoints/([^/]+)/?", place)
    store = Store(match[1] if match else place)
    folder = fetch_run(store, working_folder(store.address), checkpoints=match is None)
    if match is None:
        return folder
    name = match[2]
    if name == "last":
        found, refused = store.fetch_newest(folder / "checkpoints")
        if found is None:
            raise ConfigError([f"{store.address}: no readable checkpoint{': ' if refused else ''}{'; '.join(refused)}"])
        return found
    try:
        return store.fetch_checkpoint(name, folder / "checkpoints")
    except CheckpointError as error:
        raise ConfigError([str(error)]) from None


def listed(place: str) -> Path:
    """For looking at many runs: a folder with the small files of all runs at or below an address."""
    if not is_address(place):
        return Path(place)
    top = Store(place)
    names = top.names()
    runs = sorted({n.rpartition("/")[0] for n in names if n == "config.yaml" or n.endswith("/config.yaml")})
    folder = working_folder(top.address).with_name(f"{working_folder(top.address).name}-listed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = ("config.yaml", "metrics.jsonl", "evaluations.json", "failure.json", "command.txt", "stop")
    for run in runs:
        for name in wanted:
            full = f"{run}/{name}" if run else name
            if full in names and _inside(full):
                top.fetch(full, folder / full)
        newest = [n for n in names if re.fullmatch(rf"{re.escape(run + '/' if run else '')}checkpoints/\d+/{STATE}", n)]
        if newest:
            top.fetch(newest[-1], folder / newest[-1])
    return folder


@contextlib.contextmanager
def evaluated_here(run_dir: Path, path: Path) -> Iterator[Path]:
    """A checkpoint of a run, on this machine for the while; ``path`` is in the store when the run is kept in one."""
    from raycon import methods

    store = of(methods.read_config(run_dir / "config.yaml"))
    if store is None:
        yield path
        return
    folder = run_dir / ".evaluate"
    try:
        yield store.fetch_checkpoint(path.name, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Mirror:
    """Sends what changes in a working folder to the store, from a thread, and brings the wish to stop both ways.

    The leader of a run holds it meanwhile (``lead``). Trouble with the store is logged and tried again; at the end
    ``close`` raises StorageError when something could not be sent.
    """

    def __init__(self, store: Store, folder: Path, *, own: bool) -> None:
        """``own``: only the folders that rank 0 writes, for a rank 0 on another machine than the leader's."""
        self._store, self._folder, self._own = store, folder, own
        self._sent: dict[str, tuple[int, int]] = {}
        self._at: dict[str, float] = {}
        self._who = ""
        self._started = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="raycon-storage", daemon=True)

    def lead(self, wait: bool = True) -> None:
        """Hold the run. One that was killed goes free by itself, which is waited for. Raises ConfigError."""
        who = f"process {os.getpid()} on {platform.node()} ({uuid.uuid4().hex[:8]})"
        try:
            first, said = self._store.holder(), False
            while (held := self._store.holder())[0]:
                if not wait or (held[0] == first[0] and held[1] > first[1] + 1):  # it lives: it was renewed
                    raise ConfigError([f"run.dir = {self._store.address!r} is being trained in by {held[0]}: wait for it, "
                                       "stop it, or give another"])  # fmt: skip
                if not said:
                    logger.info("%s was led by %s: waiting up to %.0f s to see whether that lives",
                                self._store.address, held[0], held[1])  # fmt: skip
                    said = True
                time.sleep(min(1.0, EXPIRE_S / 20))
            self._who = who
            self._renew()
            time.sleep(0.2)
            if self._store.holder()[0] != who:
                raise ConfigError([f"run.dir = {self._store.address!r}: another job began at the same moment"])
        except StorageError as error:
            raise ConfigError(
                [f"run.dir: {error}: it must exist, and this machine's keys must let it write there"]
            ) from error

    def start(self) -> None:
        """From now on what changes is sent. Raises StorageError."""
        if not self._own:
            self._store.delete("stop")
        self._started = True
        self.send()
        self._thread.start()

    def bring_back(self) -> None:
        """Before the report is made: the newest checkpoint, and whether the run was stopped from elsewhere."""
        if self._store.exists("stop"):
            (self._folder / "stop").touch()
        path, refused = self._store.fetch_newest(self._folder / "checkpoints")
        for text in refused:
            logger.warning("warning: a damaged checkpoint was passed over: %s", text)
        if path is not None:
            checkpoint.keep_only(self._folder / "checkpoints", path)

    def _renew(self) -> None:
        self._store.put_bytes(json.dumps({"who": self._who, "time": time.time()}).encode(), HELD)

    def _work(self) -> None:
        renewed = looked = time.monotonic()
        while not self._done.wait(LOOK_S):
            now = time.monotonic()
            try:
                if self._who and now - renewed >= RENEW_S * min(1.0, EXPIRE_S / 60):
                    self._renew()
                    renewed = now
                if not self._own and (self._folder / "stop").exists() and "stop" not in self._sent:
                    self._send("stop")
                if now - looked >= SEND_S:
                    self.send()
                    looked = now
            except Exception as error:  # the next round tries again, and close() is strict
                logger.warning("%s", error)

    def _files(self) -> Iterator[str]:
        for top, folders, files in os.walk(self._folder):
            place = Path(top).relative_to(self._folder)
            at_root = place == Path(".")
            folders[:] = [f for f in folders if not f.startswith(".") and not (at_root and f == "checkpoints")]
            if self._own and at_root:
                folders[:], files = [f for f in folders if f in _OWN], []
            for name in files:
                if not name.startswith(".") and not name.endswith((".part", ".lock")):
                    yield str(place / name) if not at_root else name

    def send(self, all_of_it: bool = False) -> None:
        """What has changed; large files that change all the time not each time. Raises StorageError."""
        now = time.monotonic()
        for name in list(self._files()):
            with contextlib.suppress(FileNotFoundError):
                size = (self._folder / name).stat().st_size
                if all_of_it or now - self._at.get(name, -1e9) >= size / BYTES_PER_S:
                    self._send(name)

    def _send(self, name: str) -> None:
        file = self._folder / name
        facts = file.stat()
        mark = (facts.st_size, facts.st_mtime_ns)
        if self._sent.get(name) == mark:
            return
        with tempfile.TemporaryDirectory() as folder:  # a file that grows while it is sent confuses some stores
            copy = shutil.copyfile(file, Path(folder) / "copy")
            self._store.put(Path(copy), name)
        self._sent[name], self._at[name] = mark, time.monotonic()

    def close(self) -> None:
        """Send all that is left (of what was started), and let the run go. Raises StorageError."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._started:
                self.send(all_of_it=True)
        finally:
            if self._who and self._store.holder()[0] == self._who:
                self._store.delete(HELD)


@contextlib.contextmanager
def leading(address: str, folder: Path) -> Iterator[Mirror]:
    """Lead the run at an address from ``folder``, which is made what is there. The caller starts the mirror.

    Raises ConfigError when the address cannot be used, or somebody else leads it.
    """
    store = Store(address)
    mirror = Mirror(store, folder, own=False)
    mirror.lead()
    try:
        if store.exists("config.yaml"):
            fetch_run(store, folder)
        else:
            _clear(folder, [])
        yield mirror
    except BaseException:
        try:
            mirror.close()
        except Exception as error:  # what ends the run is another one
            logger.error("%s", error)
        raise
    mirror.close()


class StopWatch:
    """Looks for a file "stop" at the address, from a thread: who trains only reads a flag."""

    def __init__(self, store: Store, every_s: float = 2.0) -> None:
        self.asked = False
        self._store, self._every_s = store, every_s
        self._done = threading.Event()
        threading.Thread(target=self._work, name="raycon-stop", daemon=True).start()

    def _work(self) -> None:
        while not self.asked and not self._done.wait(self._every_s):
            try:
                self.asked = self._store.exists("stop")
            except Exception as error:
                logger.warning("%s", error)

    def close(self) -> None:
        self._done.set()


def opened(store: Store) -> tuple[Any, str]:
    """The store for Ray Train: a pyarrow file system and the path in it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(store.system)), store.root
