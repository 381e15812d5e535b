"""Writing an annotation beside its store: in constant memory, whole or not there, and resumed after an interruption."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from pretrain import __version__
from pretrain.data.annotations import FORMAT_VERSION, KINDS, NO_UNIT, PARTS_OF_SPEECH
from pretrain.data.output import LOCK, sync
from pretrain.errors import UserError

SAVE_SECONDS = 10.0  # of work that a killed process loses at most
STATE = "state.json"
_COUNTS = ("samples", "tokens", "units", "samples_without")


class AnnotationWriter:
    """Writes one annotation sample by sample in ``NAME.partial``; :meth:`publish` makes it ``NAME``.

    Now and then it notes in a state file how far it is, with the hash of what it wrote. A writer made later for the
    same store, kind and maker goes on from that note if the hash agrees: :attr:`samples` says where. Anything else in
    the partial folder is thrown away.

    Args:
        folder: where the annotation will lie, see :func:`pretrain.data.annotations.folder_of`.
        kind: one of ``KINDS``.
        made_by: what made it, JSON; kept in ``meta.json``.
        store: the store's fingerprint; None if it is not known before :meth:`finish`, and then nothing is resumed.

    Raises:
        UserError: if another process is writing this annotation.
    """

    def __init__(self, folder: Path, kind: str, made_by: dict, store: str | None = None):
        if kind not in KINDS:
            raise ValueError(f"kind '{kind}' is none of {KINDS}")
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        self.kind, self.made_by, self.store = kind, made_by, store
        self.samples = self.tokens = self.units = self.samples_without = 0
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._hash = hashlib.sha256()
        (self.partial / "meta.json").unlink(missing_ok=True)
        resumed = self._take_up()
        self._file = open(self.partial / "units.bin", "r+b" if resumed else "wb")
        self._file.truncate(2 * self.tokens)
        self._file.seek(0, os.SEEK_END)
        self._saved = time.monotonic()

    def append(self, units: np.ndarray, lengths: np.ndarray) -> None:
        """Add samples: ``units [sum of lengths]`` of any integer dtype, ``NO_UNIT`` where there is none;
        ``lengths [samples]``, none of them zero.

        Raises:
            ValueError: if the lengths do not add up, a sample's units are not numbered 0, 1, …, or a class does not
                exist.
        """
        units, lengths = np.asarray(units, np.int64), np.asarray(lengths, np.int64)
        if len(units) != lengths.sum() or (lengths < 1).any():
            raise ValueError(f"{len(units)} tokens, but positive lengths that add up to {lengths.sum()}")
        if len(units) == 0:
            return
        inside = units != NO_UNIT
        highest = np.maximum.reduceat(np.where(inside, units, -1), np.cumsum(lengths) - lengths)
        if self.kind == "spans":
            new = _first_tokens(units, lengths)
            count = int((highest + 1).sum())
            # Numbers of a sample never fall from token to token and there are as many as the highest says.
            if units.min() < 0 or units.max() > NO_UNIT or int(new.sum()) != count:
                raise ValueError("the units of a sample must be runs of tokens numbered 0, 1, … and fewer than 65,535")
        else:
            count = int(inside.sum())
            if units.min() < 0 or highest.max() >= len(PARTS_OF_SPEECH):
                raise ValueError(f"classes must be below {len(PARTS_OF_SPEECH)}")
        content = units.astype("<u2").tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.samples += len(lengths)
        self.tokens += len(units)
        self.units += count
        self.samples_without += int((highest < 0).sum())
        if self.store is not None and time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Note how far the annotation is, so that a later writer goes on from here."""
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {**self._identity(), **self._counts(), "sha256": self._hash.hexdigest()}
        new = self.partial / f"{STATE}.new"
        new.write_text(json.dumps(state))
        sync(new)
        new.replace(self.partial / STATE)
        self._saved = time.monotonic()

    def finish(self, store: str | None = None) -> None:
        """Complete the partial folder; ``store`` is the fingerprint, if it was not known before."""
        self.store = store or self.store
        self.save()
        meta = {"format_version": FORMAT_VERSION, **self._identity(), **self._counts()}
        meta |= {"sha256": self._hash.hexdigest(), "program": f"medley {__version__}"}
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        sync(self.partial / "meta.json")

    def publish(self) -> None:
        """Put the finished annotation in its place; one that lies there is replaced."""
        self.close()
        for name in (STATE, LOCK):
            (self.partial / name).unlink()
        replaced = self.folder.with_name(f"{self.folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(replaced)
        self.partial.rename(self.folder)
        sync(self.folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def close(self) -> None:
        """Let go of the files; what was saved can be gone on from."""
        self._file.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _identity(self) -> dict:
        return {"kind": self.kind, "store": self.store, "made_by": self.made_by}

    def _counts(self) -> dict:
        return {name: getattr(self, name) for name in _COUNTS}

    def _locked(self) -> int:
        descriptor = os.open(self.partial / LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self.partial}: another run is writing this annotation; wait for it") from None
        except OSError:
            pass  # a file system without locks: then nothing tells that another run lives
        return descriptor

    def _take_up(self) -> bool:
        """Go to where an interrupted writer was, if its note and the file agree; return whether they do."""
        try:
            state = json.loads((self.partial / STATE).read_text())
            if self.store is None or any(state[key] != value for key, value in self._identity().items()):
                return False
            left, digest = 2 * int(state["tokens"]), hashlib.sha256()
            with open(self.partial / "units.bin", "rb") as file:
                while left and (content := file.read(min(left, 1 << 20))):
                    digest.update(content)
                    left -= len(content)
            if left or digest.hexdigest() != state["sha256"]:
                return False
            counts = {name: int(state[name]) for name in _COUNTS}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self._hash = digest
        for name, count in counts.items():
            setattr(self, name, count)
        return True


def _first_tokens(units: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``[tokens]`` bool: the tokens whose unit is higher than all before them in their sample.

    Raises:
        ValueError: if a unit's number is lower than one before it.
    """
    sample = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.flatnonzero(units != NO_UNIT)
    key = sample[inside] * (NO_UNIT + 1) + units[inside]
    if (np.diff(key) < 0).any():
        raise ValueError("the units of a sample must be numbered in their order")
    new = np.zeros(len(units), bool)
    new[inside] = np.diff(key, prepend=-1) > 0
    return new
