"""A micro-batch: rows of tokens, and which sample every token belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from fused_objectives.editing import Edited
from pretrain.data.annotations import NO_UNIT, Annotation
from pretrain.data.store import Store


@dataclass(frozen=True)
class Batch:
    """Samples laid out in rows, as one rank sees them in one forward pass.

    A sample keeps its global id for life, and nothing about it (attention, positions, losses, corruption) depends on
    the samples it shares a row or a batch with. Shapes: S samples, ``rows × length`` places.
    """

    tokens: torch.Tensor
    """``[rows, length]`` int64 token ids; padding token where there is no sample."""
    segment_ids: torch.Tensor
    """``[rows, length]`` int64: which of the S samples a place belongs to, −1 for padding."""
    position_ids: torch.Tensor
    """``[rows, length]`` int64: position within the sample, 0 for padding."""
    sample_ids: torch.Tensor
    """``[S]`` int64: global ids."""
    visits: torch.Tensor
    """``[S]`` int64: how many times each sample was seen before (its epoch)."""
    lengths: torch.Tensor
    """``[S]`` int64: tokens of each sample."""
    sample_rows: torch.Tensor
    """``[S]`` int64: each sample's row in the step's global batch; the same whatever the ranks and micro-batches."""
    units: dict[str, torch.Tensor] = field(default_factory=dict)
    """Annotation → ``[rows, length]`` int64: the number of each token's unit within its sample, ``NO_UNIT`` in none."""

    @property
    def real(self) -> torch.Tensor:
        """``[rows, length]`` bool: places that hold a token."""
        return self.segment_ids >= 0

    def sum_per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """Add up ``values [rows, length]`` over the places of each sample, ``[S]``; padding is left out."""
        sums = values.new_zeros(len(self.sample_ids) + 1)
        return sums.index_add(0, self.segment_ids.reshape(-1) + 1, values.reshape(-1))[1:]

    def edited(self, edit: Edited) -> "Batch":
        """Return the batch after an edit that moved its tokens; units do not move along."""
        return replace(
            self,
            tokens=edit.tokens,
            segment_ids=edit.segments,
            position_ids=edit.positions,
            lengths=edit.lengths,
            units={},
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "units"}
        moved = {name: array.to(device, non_blocking=True) for name, array in arrays.items()}
        units = {name: array.to(device, non_blocking=True) for name, array in self.units.items()}
        return replace(self, **moved, units=units)


def collate(
    store: Store,
    rows: list[np.ndarray],
    visits: list[np.ndarray],
    first_row: int,
    row_length: int,
    pad_id: int,
    annotations: Mapping[str, Annotation] | None = None,
) -> Batch:
    """Lay samples out in rows.

    Args:
        store: where the tokens are.
        rows: for each row the global ids of its samples, in order of place.
        visits: the samples' visits, in the same form.
        first_row: number of the first row within the step's global batch.
        row_length: places a row.
        pad_id: token that fills what is left.
        annotations: those of the store whose units are wanted, by name.
    """
    ids = np.concatenate(rows) if rows else np.empty(0, np.int64)
    lengths = store.lengths[ids].astype(np.int64)
    sample_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    starts = np.cumsum(lengths) - lengths
    row_starts = np.cumsum(np.bincount(sample_rows, lengths, len(rows)).astype(np.int64))
    row_starts = np.concatenate([[0], row_starts])[:-1]
    column = starts - row_starts[sample_rows] if len(ids) else starts

    segments, counted = np.repeat(np.arange(len(ids)), lengths), np.arange(lengths.sum())
    places = np.repeat(sample_rows * row_length + column - starts, lengths) + counted
    flat = np.full((3, len(rows) * row_length), -1, np.int64)
    flat[0], flat[2] = pad_id, 0
    sources = np.repeat(store.offsets[ids] - starts, lengths) + counted
    flat[0, places] = store.tokens[sources]
    flat[1, places] = segments
    flat[2, places] = counted - np.repeat(starts, lengths)
    tokens, segment_ids, position_ids = torch.from_numpy(flat.reshape(3, len(rows), row_length))
    units = {}
    for name, annotation in (annotations or {}).items():
        laid_out = np.full(len(rows) * row_length, NO_UNIT, np.int64)
        laid_out[places] = annotation.look_up(ids, sources)
        units[name] = torch.from_numpy(laid_out.reshape(len(rows), row_length))
    return Batch(
        tokens=tokens,
        segment_ids=segment_ids,
        position_ids=position_ids,
        sample_ids=torch.from_numpy(ids),
        visits=torch.from_numpy(np.concatenate(visits) if visits else np.empty(0, np.int64)),
        lengths=torch.from_numpy(lengths),
        sample_rows=torch.from_numpy(sample_rows + first_row),
        units=units,
    )
