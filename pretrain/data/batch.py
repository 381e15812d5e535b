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
    index: np.ndarray | None = None,
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
        index: ``[S, 2]`` int64: the store's index of the samples, where it has been read already.
    """
    ids = np.concatenate(rows) if rows else np.empty(0, np.int64)
    offsets, lengths = (store.index[ids] if index is None else index).T
    sample_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    filled = np.bincount(sample_rows, lengths, len(rows))
    real = np.arange(row_length) < filled[:, None]  # in the order of places as in that of samples

    flat = np.empty((3, len(rows), row_length), np.int64)
    flat[0], flat[1], flat[2] = pad_id, -1, 0
    flat[0][real] = store.tokens.runs(offsets, lengths)
    flat[1][real] = np.repeat(np.arange(len(ids)), lengths)
    flat[2][real] = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens, segment_ids, position_ids = torch.from_numpy(flat)
    units = {}
    for name, annotation in (annotations or {}).items():
        laid_out = np.full(real.shape, NO_UNIT, np.int64)
        laid_out[real] = annotation.look_up(ids, offsets, lengths)
        units[name] = torch.from_numpy(laid_out)
    return Batch(
        tokens=tokens,
        segment_ids=segment_ids,
        position_ids=position_ids,
        sample_ids=torch.from_numpy(ids),
        visits=torch.from_numpy(np.concatenate(visits) if visits else np.empty(0, np.int64)),
        lengths=torch.from_numpy(np.ascontiguousarray(lengths)),
        sample_rows=torch.from_numpy(sample_rows + first_row),
        units=units,
    )
