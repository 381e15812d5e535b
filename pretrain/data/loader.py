"""The loader: the endless, deterministic sequence of global batches, and each rank's part of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fused_objectives.philox import philox
from pretrain.data.annotations import Annotation
from pretrain.data.batch import Batch, collate
from pretrain.data.order import shuffled
from pretrain.data.packing import pack
from pretrain.data.store import Store
from pretrain.errors import UserError


@dataclass(frozen=True)
class StepBatch:
    """What one rank needs of one step: its micro-batches, and the facts of the global batch."""

    micro_batches: list[Batch]
    first_samples: list[int]
    """For each of them, how many samples of the global batch come before its own, in the order of rows."""
    samples: int
    """Samples in the global batch."""
    tokens: int
    """Real tokens in the global batch."""
    sample_ids_sha256: str
    """Hash of the global batch's sorted sample ids."""


class Loader:
    """Yields global batches of ``batch_rows`` rows, the same ones whatever the world size and micro-batch.

    The stream of samples (see :func:`pretrain.data.order.shuffled`) is cut into windows; each window's samples are
    packed into rows and the rows shuffled; a step takes the next ``batch_rows`` rows. Everything is a function of
    (seed, window, row), so the state is three counters, and going on from any of them takes the time to pack one
    window, whatever the store's size.

    Args:
        store: the samples.
        seed: the run's seed.
        row_length: places a row, in tokens.
        batch_rows: rows in a global batch.
        micro_batch_rows: rows in one forward pass of one rank.
        rank, world_size: which part of each global batch is ours.
        pad_id: token that fills the rows.
        packing: several samples a row; otherwise one.
        window: samples that are packed together.
        annotations: those of the store that batches shall bring, by name.

    Raises:
        UserError: for a store that is empty or has samples longer than a row.
    """

    def __init__(
        self,
        store: Store,
        *,
        seed: int,
        row_length: int,
        batch_rows: int,
        micro_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
        packing: bool = True,
        window: int = 4096,
        annotations: Mapping[str, Annotation] | None = None,
    ):
        if len(store) == 0:
            raise UserError(f"{store.folder}: the store is empty")
        if store.max_length > row_length:
            raise UserError(
                f"data.row_length: {row_length} is shorter than the longest sample of {store.folder}; "
                f"use {store.max_length} or more"
            )
        self.store, self.seed, self.row_length, self.pad_id = store, seed, row_length, pad_id
        self.annotations = annotations
        self.batch_rows, self.micro_batch_rows = batch_rows, micro_batch_rows
        self.rank, self.world_size = rank, world_size
        self.packing, self.window_size = packing, min(window, len(store))
        self.window = self.row = self.samples = 0
        self._window_rows = lru_cache(maxsize=2)(self._pack_window)

    def check_fills_a_batch(self) -> None:
        """Raise :class:`UserError` if the whole store fills less than one global batch."""
        rows = window = 0
        while rows < self.batch_rows and window * self.window_size < len(self.store):
            rows += len(self._window_rows(window))
            window += 1
        if rows < self.batch_rows:
            raise UserError(
                f"{self.store.folder}: {len(self.store)} samples fill at most {rows} rows of {self.row_length} tokens, "
                f"less than one batch (training.batch_rows = {self.batch_rows}); use a larger corpus or a smaller batch"
            )

    def _pack_window(self, window: int) -> list[np.ndarray]:
        """Return the rows of one window: of each ``[samples, 4]`` int64, their ids, visits, offsets and lengths."""
        positions = np.arange(window * self.window_size, (window + 1) * self.window_size)
        ids, visits = shuffled(positions, len(self.store), self.seed)
        samples = np.concatenate([np.stack([ids, visits], axis=1), self.store.index[ids]], axis=1)
        if not self.packing:
            return list(samples[:, None])
        rows = pack(samples[:, 3], self.row_length)
        draws = philox(self.seed, "row order", np.arange(len(rows)), window & 0xFFFFFFFF, window >> 32)[0]
        order = np.argsort(draws, kind="stable")
        return [samples[rows[i]] for i in order]

    def next(self) -> StepBatch:
        """Return this rank's part of the next global batch and move on."""
        rows: list[np.ndarray] = []
        while len(rows) < self.batch_rows:
            window_rows = self._window_rows(self.window)
            taken = slice(self.row, self.row + self.batch_rows - len(rows))
            rows += window_rows[taken]
            self.row = min(taken.stop, len(window_rows))
            if self.row == len(window_rows):
                self.window, self.row = self.window + 1, 0
        ids, _, _, lengths = np.concatenate(rows).T
        self.samples += len(ids)
        stride = self.micro_batch_rows * self.world_size
        starts = range(self.rank * self.micro_batch_rows, self.batch_rows, stride)
        before = np.cumsum([0, *map(len, rows)])
        return StepBatch(
            [self._micro_batch(rows, start) for start in starts],
            [int(before[start]) for start in starts],
            samples=len(ids),
            tokens=int(lengths.sum()),
            sample_ids_sha256=hashlib.sha256(np.sort(ids).astype("<i8").tobytes()).hexdigest(),
        )

    def _micro_batch(self, rows: list[np.ndarray], start: int) -> Batch:
        rows = rows[start : start + self.micro_batch_rows]
        return collate(
            self.store,
            [row[:, 0] for row in rows],
            [row[:, 1] for row in rows],
            start,
            self.row_length,
            self.pad_id,
            self.annotations,
            np.concatenate(rows)[:, 2:],
        )

    def state_dict(self) -> dict:
        """Return the position, and what must be equal for it to mean the same samples."""
        return {"window": self.window, "row": self.row, "samples": self.samples, "identity": self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position; a :class:`UserError` if it was made with another store or another layout of rows."""
        names = {
            "store": "data.store: another store than the checkpoint's",
            "row_length": "data.row_length differs from the checkpoint's",
            "packing": "data.packing differs from the checkpoint's",
            "window": "data.packing_window differs from the checkpoint's",
            "seed": "seed differs from the checkpoint's",
        }
        for key, value in self._identity().items():
            if state["identity"].get(key) != value:
                raise UserError(f"{names[key]} ({value}, was {state['identity'].get(key)}); start a new run folder")
        self.window, self.row, self.samples = state["window"], state["row"], state["samples"]

    def _identity(self) -> dict:
        return {
            "store": self.store.fingerprint,
            "row_length": self.row_length,
            "packing": self.packing,
            "window": self.window_size,
            "seed": self.seed,
        }
