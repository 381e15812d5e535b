"""An output folder that is there whole or not at all."""

import errno
import fcntl
import glob
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.errors import UserError

LOCK = ".lock"  # held while a partial folder is being written; the system lets go of it however the process ends


@contextmanager
def whole_folder(out: str | Path, overwrite: bool, marks: tuple[str, ...]) -> Iterator[Path]:
    """Give a folder ``OUT.partial-PID`` to write in; make it ``out`` at the end, or remove it on error or signal.

    What an earlier run left behind when it was killed is removed. SIGTERM ends the process as Ctrl-C does, with
    exit code 143.

    Args:
        marks: paths that a folder of this kind has; a folder without them is not overwritten.

    Raises:
        UserError: if ``out`` exists and is not to be, or must not be, overwritten, or cannot be written.
    """
    out = Path(out)
    _check_free(out, overwrite, marks)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
            _remove_if_abandoned(left)
        partial.mkdir()
        lock = _locked(partial)
    except FileExistsError:
        raise UserError(f"{partial}: another run is writing this folder; choose another --out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    try:
        with _terminable():
            yield partial
            for path in sorted(partial.rglob("*")):
                sync(path)
            _check_free(out, overwrite, marks)
            _publish(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: no space left to write it; make room or choose another --out") from None
        raise
    finally:
        os.close(lock)


def sync(path: Path) -> None:
    """Have a file's or folder's content on disk before what follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free(out: Path, overwrite: bool, marks: tuple[str, ...]) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{out}: exists already; choose another --out, or give --overwrite")
    if not out.is_dir() or out.is_symlink() or not all((out / mark).exists() for mark in marks):
        raise UserError(f"{out}: is not a folder this command made, so --overwrite does not delete it")


def _locked(folder: Path) -> int:
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # a file system without locks: then nothing tells that this run lives
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):  # another run holds the lock, or removes the folder at this very moment
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _publish(partial: Path, out: Path) -> None:
    (partial / LOCK).unlink()
    replaced = partial.with_name(f"{partial.name}-replaced")
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that folders are removed; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
