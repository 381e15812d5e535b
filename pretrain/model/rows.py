"""Whose rows the layers of a model see.

A layer sees rows of numbers and not whose they are. Whoever lays rows out says so here while layers run on them, so
that gradients can be told apart by sample. While nothing is recorded nobody asks, and it costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The samples of the rows that layers see at present."""

    segments: torch.Tensor
    """``[rows, length]``, or ``[N]`` where rows are flat, int64: which sample a place belongs to, −1 for padding.
    ``[rows, 1]``: each row belongs to one sample, however long it is."""
    scattered: bool = False
    """A sample's places may be no contiguous run."""

    def of(self, shape: torch.Size) -> torch.Tensor | None:
        """Return the sample of each vector of an array, ``[N]`` int64, from the array's shape without its last
        dimension; None if its vectors are no such rows. A place may hold several vectors, such as heads."""
        segments = self.segments
        if segments.ndim == 2 and segments.shape[1] == 1 and len(shape) > 1 and shape[0] == len(segments):
            segments = segments.expand(-1, shape[1])
        if shape[: segments.ndim] == segments.shape:
            vectors = shape[segments.ndim :].numel()
            flat = segments.reshape(-1)
            return flat if vectors == 1 else flat.repeat_interleave(vectors)
        return segments.reshape(-1) if shape == (segments.numel(),) else None


_ROWS: ContextVar[Rows | None] = ContextVar("rows", default=None)
_OWNERS: ContextVar[torch.Tensor | None] = ContextVar("owners", default=None)


def present_rows() -> Rows | None:
    """Return whose rows layers see at present; None if nobody has said."""
    return _ROWS.get()


@contextmanager
def rows_of(segments: torch.Tensor) -> Iterator[None]:
    """Let the rows that layers see within belong to samples as ``segments`` say, in a form that :class:`Rows` takes."""
    owners = _OWNERS.get()
    if owners is not None:
        segments = torch.where(segments < 0, -1, owners[segments])
    token = _ROWS.set(Rows(segments, scattered=owners is not None))
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextmanager
def owned_by(owners: torch.Tensor) -> Iterator[None]:
    """Let what is said of sample d within count for sample ``owners[d]``, int64, or for none where that is −1."""
    token = _OWNERS.set(owners)
    try:
        yield
    finally:
        _OWNERS.reset(token)
