"""Arrays that lie in files and are read where they are indexed.

Nothing is mapped into memory: a page of a mapped file that cannot be had (a file cut short, a server that is gone)
ends the process with SIGBUS, and mapped pages count towards a job's memory. Here the same is an error that names the
file, and a process holds what it asked for and no more. A read neither moves nor shares a position, so an array may
be read in several threads and after a fork.
"""

import errno
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.errors import RunError, UserError

REACH_BYTES = 512  # reading on over a gap as wide costs what another read does
PIECE_BYTES = 1 << 22  # of a file that is read from its start to its end


@dataclass(frozen=True)
class Part:
    """A file that holds a part of an array: ``items`` of them, behind ``skipped`` bytes; ``sha256`` is the whole
    file's, None where it is not known."""

    path: Path
    items: int
    skipped: int = 0
    sha256: str | None = None


class DiskArray:
    """An array of items of one dtype in one or several files, its parts.

    ``array[i]``, ``array[a:b]`` and ``array[places]``, for an array of places in any order, read those items. A file
    that vanishes or is cut short later is a :class:`RunError` that names it, at the read that needs it.

    Args:
        parts: in the order of their items.
        dtype: of an item, which may be a row of numbers.
        remedy: how a file that is missing or not as long as it should be is mended.

    Raises:
        UserError: if a file cannot be opened, or its size is not that of its items.
    """

    def __init__(self, parts: Sequence[Part], dtype: np.dtype, remedy: str):
        self.parts, self.dtype = list(parts), np.dtype(dtype)
        self._descriptors: list[int] = []  # the parts' own first, then copies'
        weakref.finalize(self, _close, self._descriptors).atexit = False
        for part in self.parts:
            self._descriptors.append(_open(part, self.size_of(part), remedy))
        self._sources = list(self._descriptors)
        self._lost: dict[int, Callable[[str], None]] = {}
        counts = np.array([part.items for part in self.parts], np.int64)
        self._firsts = np.cumsum(counts) - counts
        self._skipped = np.array([part.skipped for part in self.parts], np.int64)
        self._length = int(counts.sum())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key) -> np.ndarray:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._span(start, max(start, stop)) if step == 1 else self._gather(np.arange(start, stop, step))
        places = np.asarray(key)
        if places.dtype == bool:
            return self._gather(np.flatnonzero(places))
        outside = (places < -len(self)) | (places >= len(self))
        if outside.any():
            raise IndexError(f"{places[outside].flat[0]} is not in an array of {len(self)}")
        places = np.where(places < 0, places + len(self), places)
        return self._gather(places) if places.ndim else self._span(int(places), int(places) + 1)[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def runs(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return runs of items one after another, ``[sum of lengths]``; those that touch are read as one.

        Args:
            starts: ``[runs]`` int64: the first item of each.
            lengths: ``[runs]`` int64, in items; no run goes on in another part.
        """
        if not len(starts):
            return np.empty(0, self.dtype)
        number = np.searchsorted(self._firsts, starts, side="right") - 1
        apart = (starts[1:] != starts[:-1] + lengths[:-1]) | (number[1:] != number[:-1])
        first = np.concatenate([[0], np.flatnonzero(apart) + 1])
        number = number[first]
        places = (starts[first] - self._firsts[number]) * self.dtype.itemsize + self._skipped[number]
        sizes = np.add.reduceat(lengths, first) * self.dtype.itemsize
        return np.frombuffer(self._read(number.tolist(), sizes.tolist(), places.tolist()), self.dtype)

    def size_of(self, part: Part) -> int:
        """Return the bytes of a part's file."""
        return part.skipped + part.items * self.dtype.itemsize

    def content(self, number: int) -> Iterator[bytes]:
        """Yield the whole file of a part, the original whatever copies are in use, in pieces."""
        size = self.size_of(self.parts[number])
        for place in range(0, size, PIECE_BYTES):
            yield self._original(number, min(PIECE_BYTES, size - place), place)

    def use_copy(self, number: int, descriptor: int, lost: Callable[[str], None]) -> None:
        """Read a part from a copy of its file from now on, or from the original again once the copy cannot be read.

        Args:
            descriptor: of the copy, open for reading; it is closed with the array.
            lost: told the reason, should the copy become unreadable.
        """
        self._descriptors.append(descriptor)
        self._lost[number] = lost
        self._sources[number] = descriptor

    def _span(self, start: int, stop: int) -> np.ndarray:
        borders = self._firsts[(self._firsts > start) & (self._firsts < stop)]
        starts = np.concatenate([[start], borders])
        return self.runs(starts, np.concatenate([borders, [stop]]) - starts) if len(self.parts) else self.runs([], [])

    def _gather(self, places: np.ndarray) -> np.ndarray:
        """Read items anywhere, those that lie near each other with what is between them."""
        order = np.argsort(places, kind="stable")
        ranked = places[order]
        number = np.searchsorted(self._firsts, ranked, side="right")
        begins = np.ones(len(ranked), bool)
        begins[1:] = (np.diff(ranked) > REACH_BYTES // self.dtype.itemsize) | (number[1:] != number[:-1])
        first = np.flatnonzero(begins)
        starts = ranked[first]
        lengths = ranked[np.append(first[1:], len(ranked)) - 1] + 1 - starts if len(first) else starts
        shift = starts - (np.cumsum(lengths) - lengths)  # from a place to where its item was read to
        read = self.runs(starts, lengths)
        found = np.empty((len(places), *read.shape[1:]), read.dtype)
        found[order] = read[ranked - shift[np.cumsum(begins) - 1]]
        return found

    def _read(self, numbers: list[int], sizes: list[int], places: list[int]) -> bytes:
        descriptors = [self._sources[number] for number in numbers]
        try:
            content = b"".join(map(os.pread, descriptors, sizes, places))
        except OSError:
            content = b""
        if len(content) == sum(sizes):
            return content
        return b"".join(map(self._again, numbers, sizes, places))  # one by one, to see what is wrong

    def _again(self, number: int, size: int, place: int) -> bytes:
        if number in self._lost:
            try:
                return _whole(self._sources[number], size, place)
            except OSError as error:
                self._sources[number] = self._descriptors[number]
                self._lost.pop(number)(error.strerror)
        return self._original(number, size, place)

    def _original(self, number: int, size: int, place: int) -> bytes:
        try:
            return _whole(self._descriptors[number], size, place)
        except OSError as error:
            raise RunError(f"{self.parts[number].path}: cannot be read any more: {error.strerror}") from None


def _open(part: Part, size: int, remedy: str) -> int:
    try:
        descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{part.path}: is missing; {remedy}") from None
    except OSError as error:
        more = "; raise 'ulimit -n', or prepare larger shards" if error.errno == errno.EMFILE else ""
        raise UserError(f"{part.path}: cannot be opened ({error.strerror}){more}") from None
    found = os.fstat(descriptor).st_size
    if found != size:
        os.close(descriptor)
        raise UserError(f"{part.path}: is damaged: it has {found:,} bytes, but meta.json says {size:,}; {remedy}")
    return descriptor


def _whole(descriptor: int, size: int, place: int) -> bytes:
    """Read as often as it takes to have all bytes: a file system may give fewer than it is asked for.

    Raises:
        OSError: if it cannot be read, or ends before that.
    """
    pieces = []
    while size:
        piece = os.pread(descriptor, size, place)
        if not piece:
            raise OSError(0, f"it has been cut to {os.fstat(descriptor).st_size:,} bytes")
        pieces.append(piece)
        size, place = size - len(piece), place + len(piece)
    return b"".join(pieces)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
