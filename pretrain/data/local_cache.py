"""A node's local copies of the files that its ranks read over and over from a shared file system.

A copy is named by the sha256 of its content, so it is the same file for every store, run and rank that wants it. Who
copies holds the folder's lock: a copy is written under a temporary name, compared with size and hash, and renamed when
whole, so what has its name is whole, and what has the temporary name while nobody holds the lock is waste. Who reads a
copy holds a shared lock on it, which the system lets go of however the process ends; only copies that nobody reads are
ever removed.
"""

import fcntl
import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from pydantic import Field

from pretrain.config import Config
from pretrain.data.disk_array import DiskArray, Part
from pretrain.data.output import LOCK
from pretrain.errors import RunError

SUFFIX = ".bin"
INCOMING = "incoming.partial"


class CacheConfig(Config):
    """Where a node keeps copies of what it reads."""

    folder: str
    """On a disk of the node; all ranks and runs of a node may share it."""
    gigabytes: float = Field(gt=0)
    """The most that all copies there take together, in 10⁹ bytes."""


class LocalCache:
    """Copies the files of some arrays to a local folder and has the arrays read the copies.

    All files of a run are read equally often, so none of them makes room for another: what fits stays, the rest is read
    where it lies. Room is made by removing copies that this run does not want and nobody reads, the least recently used
    ones first.

    Args:
        config: where, and how much.
        arrays: those that are read most often for their size first. Parts without a hash are not copied.
    """

    def __init__(self, config: CacheConfig, arrays: Sequence[DiskArray]):
        self.folder, self.limit = Path(config.folder), int(config.gigabytes * 1e9)
        self._wanted = [
            (array, number, part) for array in arrays for number, part in enumerate(array.parts) if part.sha256
        ]
        self._names = {_name(part) for _, _, part in self._wanted}
        self._thread = threading.Thread(target=self._run, name="local cache", daemon=True)

    def start(self) -> None:
        """Begin to copy in the background; a second call does nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def join(self) -> None:
        """Wait until everything that fits is copied, or copying has failed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._fill()
        except (OSError, RunError) as error:
            reason = error if isinstance(error, RunError) else f"{self.folder}: {error.strerror or error}"
            _warn(f"{reason}; what is not copied is read where it lies")

    def _fill(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():  # before anything is taken into use: the bound may be lower than it was
            self._make_room(0)
        for array, number, part in self._wanted:
            if self._adopt(array, number, part):
                continue
            with self._alone():
                size = array.size_of(part)
                if not self._adopt(array, number, part) and self._make_room(size):  # nor has another rank copied it
                    self._copy(array, number, part)
                    self._adopt(array, number, part)

    def _adopt(self, array: DiskArray, number: int, part: Part) -> bool:
        """Have an array read a copy, if there is one; return whether there is."""
        path = self.folder / _name(part)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for who is about to remove it
            state = os.fstat(descriptor)
            if state.st_nlink and state.st_size == array.size_of(part):
                with suppress(PermissionError):  # another user's
                    os.utime(descriptor)
                array.use_copy(number, descriptor, partial(_tell_lost, path, part))
                descriptor = None
                return True
            return False
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _copy(self, array: DiskArray, number: int, part: Part) -> None:
        """Copy a part's file; the folder's lock is held."""
        incoming, digest = self.folder / INCOMING, hashlib.sha256()
        try:
            with open(incoming, "wb") as file:
                for content in array.content(number):
                    file.write(content)
                    digest.update(content)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != part.sha256:
                raise RunError(f"{part.path}: its content is not the one that meta.json has the hash of")
            incoming.replace(self.folder / _name(part))
        finally:
            incoming.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Remove copies until ``size`` more bytes are within the bound, if that can be; return whether they are. The
        folder's lock is held."""
        (self.folder / INCOMING).unlink(missing_ok=True)
        copies = [(path, path.stat()) for path in self.folder.glob(f"*{SUFFIX}")]
        excess = sum(state.st_size for _, state in copies) + size - self.limit
        for path, state in sorted(copies, key=lambda copy: (copy[0].name in self._names, copy[1].st_mtime_ns)):
            if excess <= 0 or (size and path.name in self._names):
                break
            if _remove_unused(path):
                excess -= state.st_size
        return excess <= 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder's lock, waiting for it."""
        with open(self.folder / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _name(part: Part) -> str:
    return part.sha256 + SUFFIX


def _tell_lost(path: Path, part: Part, reason: str) -> None:
    _warn(f"{path}: cannot be read any more: {reason}; {part.path} is read instead")


def _warn(line: str) -> None:
    """Say something of this node once, not from each of its ranks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: data.cache: {line}", file=sys.stderr, flush=True)


def _remove_unused(path: Path) -> bool:
    """Remove a copy unless a process reads it; return whether it was removed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
