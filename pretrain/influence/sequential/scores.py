"""Scores of a store's samples, kept beside them, and made piece by piece.

Scores of a store are a folder of two files within it::

    scores/NAME/scores.bin    one little-endian float32 a sample, by its id
    scores/NAME/meta.json     format version, the store's fingerprint, count, sha256, what made them

While they are made, ``scores/NAME.chunks-…`` holds a file for each chunk of samples that is done.
"""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from pretrain import __version__
from pretrain.data.output import sync, whole_folder
from pretrain.data.store import Store
from pretrain.errors import UserError, nearest

FORMAT_VERSION = 1
CHUNK_SAMPLES = 2048
FILE = "scores.bin"
_MARKS = (FILE, "meta.json")


class Scores:
    """Read access to scores of a store.

    Raises:
        UserError: if the store has none of this name, or they are of another store or damaged.
    """

    def __init__(self, store: Store, name: str):
        self.folder = folder_of(store, name)
        again = f"make them with 'medley score --checkpoint CHECKPOINT --store {store.folder.parent} --out {name}'"
        if not (self.folder / "meta.json").is_file():
            others = sorted(path.name for path in self.folder.parent.glob("*") if (path / "meta.json").is_file())
            match = nearest(name, others)
            hint = f"; did you mean '{match}'?" if match else f"; {again}"
            raise UserError(f"{store.folder}: has no scores '{name}'{hint}")
        again = f"{again[:-1]} --overwrite'"
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            version, fingerprint, self.made_by = (self.meta[key] for key in ("format_version", "store", "made_by"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.folder / 'meta.json'}: is not that of scores ({error!r}); {again}") from None
        if version != FORMAT_VERSION:
            raise UserError(f"{self.folder}: format version {version}, this program reads {FORMAT_VERSION}; {again}")
        if fingerprint != store.fingerprint:
            raise UserError(f"{self.folder}: scores of another store; {again}")
        file = self.folder / FILE
        if not file.is_file() or file.stat().st_size != 4 * len(store):
            raise UserError(f"{file}: is damaged: not 4 bytes for each of {len(store):,} samples; {again}")
        self.values = np.fromfile(file, "<f4")


class ScoreWriter:
    """Takes a store's scores in chunks, in any order and from any number of processes that share the folder.

    A chunk that is there is whole, so who comes later makes those that are missing. Chunks of other scores of the same
    name, made by something else, lie in another folder.

    Args:
        store: whose samples are scored.
        name: of the scores.
        made_by: what makes them, JSON; kept in ``meta.json``.
        overwrite: replace scores of this name.

    Raises:
        UserError: if something else has made scores of this name.
    """

    def __init__(self, store: Store, name: str, made_by: dict, overwrite: bool = False):
        self.folder, self.samples = folder_of(store, name), len(store)
        self.identity, self.overwrite = {"store": store.fingerprint, "made_by": made_by}, overwrite
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.chunks = self.folder.with_name(f"{name}.chunks-{digest[:12]}")
        if self.is_published():
            return
        if self.folder.exists() and not overwrite:
            raise UserError(f"{self.folder}: exists already; choose another --out, or give --overwrite")
        try:
            self.chunks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.chunks}: cannot be written ({error.strerror})") from None

    def is_published(self) -> bool:
        """Whether these very scores are in their place."""
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            same = {key: meta[key] for key in self.identity} == self.identity
            whole = meta["format_version"] == FORMAT_VERSION and (self.folder / FILE).stat().st_size == 4 * self.samples
            return same and whole
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def __len__(self) -> int:
        return -(-self.samples // CHUNK_SAMPLES)

    def span(self, chunk: int) -> tuple[int, int]:
        """Return a chunk's first sample and the one behind its last."""
        return chunk * CHUNK_SAMPLES, min((chunk + 1) * CHUNK_SAMPLES, self.samples)

    def is_done(self, chunk: int) -> bool:
        """Whether a chunk is there."""
        return self._file(chunk).is_file()

    def write(self, chunk: int, scores: np.ndarray) -> None:
        """Keep a chunk's scores, ``[samples]`` floating."""
        new = self.chunks / f"{chunk:08d}.{os.getpid()}.new"
        scores.astype("<f4").tofile(new)
        sync(new)
        new.replace(self._file(chunk))

    def publish(self) -> bool:
        """Put the scores in their place if all chunks are there; return whether this process did."""
        try:
            lock = open(self.chunks / ".lock", "w")
        except FileNotFoundError:  # another process has published
            return False
        with lock:
            with suppress(OSError):  # a file system without locks: two that end together may both publish the same
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.chunks.is_dir() or not all(map(self.is_done, range(len(self)))):
                return False
            parts = [np.fromfile(self._file(chunk), "<f4") for chunk in range(len(self))]
            values = np.concatenate([np.empty(0, "<f4"), *parts])
            with whole_folder(self.folder, self.overwrite, _MARKS) as partial:
                values.tofile(partial / FILE)
                meta = {
                    "format_version": FORMAT_VERSION,
                    **self.identity,
                    "samples": self.samples,
                    "mean": float(values.mean(dtype=np.float64)) if len(values) else 0.0,
                    "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
                    "program": f"medley {__version__}",
                }
                (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
            shutil.rmtree(self.chunks, ignore_errors=True)
        return True

    def _file(self, chunk: int) -> Path:
        return self.chunks / f"{chunk:08d}.bin"


def folder_of(store: Store, name: str) -> Path:
    """Return where scores of a store lie."""
    return store.folder / "scores" / name
