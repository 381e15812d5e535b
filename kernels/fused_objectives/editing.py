"""Editing: inserts or deletes tokens, for inserted, added and deleted token detection (arXiv 2305.03981, 2210.10293).

Samples change their length. They stay in their row and in their order, moved together; what no longer fits is dropped
from the row's end and counted.
"""

from typing import NamedTuple

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton
from fused_objectives.checks import BOOL, INT64, check, check_count
from fused_objectives.draws import threshold, token_words, words
from fused_objectives.philox import below, stream_id
from fused_objectives.segments import checked
from fused_objectives.targets import IGNORED

_BLOCK = 512


class Edited(NamedTuple):
    """A corrupted batch, laid out anew."""

    tokens: torch.Tensor
    """``[rows, capacity]`` int64, padding token where there is no sample."""
    segments: torch.Tensor
    """``[rows, capacity]`` int64, −1 for padding."""
    positions: torch.Tensor
    """``[rows, capacity]`` int64: position within the edited sample, 0 for padding."""
    labels: torch.Tensor
    """``[rows, capacity]`` int64: 1 or 0, :data:`IGNORED` for padding."""
    sources: torch.Tensor
    """``[rows, capacity]`` int64: place of the original token in the flattened input, −1 for inserted and padding."""
    lengths: torch.Tensor
    """``[S]`` int64: tokens of each sample that are in its row."""
    dropped: torch.Tensor
    """``[S]`` int64: tokens of each sample, original or inserted, that did not fit."""

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """``[S + 1]`` int32: running sum of the lengths, from 0."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)


def insert_tokens(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    *,
    seed: int,
    stream: str,
    rate: float,
    ordinary_ids: torch.Tensor,
    insert_id: int | None,
    pad_id: int,
    capacity: int,
    impl: str = "auto",
) -> Edited:
    """Insert a token before every token but a sample's first with probability ``rate``; label 1 where inserted, else 0.

    Word 0 of the call (position, sample, visit) of the token behind decides, word 2 picks the inserted one.

    Args:
        tokens, segments, positions: ``[rows, length]`` int64: token ids; which sample a token belongs to (a sample's
            tokens are one contiguous run, within a row; −1 is padding); position within the sample.
        sample_ids, visits: ``[S]`` int64.
        seed, stream: key of the random numbers.
        rate: probability of an insertion.
        ordinary_ids: ``[n]`` int64, the tokens of which one is inserted.
        insert_id: the token to insert instead, such as the mask token; None draws one.
        pad_id: padding token.
        capacity: places a row of the result.

    Bytes: 24 read a place of the input, 40 written a place of the result.

    Raises:
        ValueError: if the rate is no probability, or there is no token to insert; for shapes, dtypes or segments that
            are not so.
    """
    _check(tokens, segments, positions, sample_ids, visits, capacity, impl, ordinary_ids=(ordinary_ids, "n", INT64))
    if insert_id is None and len(ordinary_ids) == 0:
        raise ValueError("ordinary_ids: no token to insert")
    edit = threshold(rate), seed & 0xFFFFFFFF, stream, None, ordinary_ids, insert_id, pad_id, capacity
    return Edited(*_edit(tokens, segments, positions, sample_ids, visits, *edit, impl))


def delete_tokens(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    *,
    seed: int,
    stream: str,
    rate: float,
    is_ordinary: torch.Tensor,
    pad_id: int,
    capacity: int | None = None,
    impl: str = "auto",
) -> Edited:
    """Delete ordinary tokens with probability ``rate``; label 1 on a token behind a gap, else 0.

    Word 0 of a token's call (position, sample, visit) decides. A gap at a sample's end has no token to carry its label;
    a sample without special tokens may lose all it has.

    Args:
        tokens, segments, positions, sample_ids, visits, seed, stream, pad_id: see :func:`insert_tokens`; a sample's
            tokens are one contiguous run, within a row.
        rate: probability of a deletion.
        is_ordinary: ``[V]`` bool, which tokens may be deleted.
        capacity: places a row of the result; None for as many as the input has.

    Bytes: 24 read a place of the input, 40 written a place of the result.

    Raises:
        ValueError: if the rate is no probability, and for shapes, dtypes or segments that are not so.
    """
    _check(tokens, segments, positions, sample_ids, visits, capacity, impl, is_ordinary=(is_ordinary, "V", BOOL))
    capacity = tokens.shape[1] if capacity is None else capacity
    edit = threshold(rate), seed & 0xFFFFFFFF, stream, is_ordinary, None, None, pad_id, capacity
    return Edited(*_edit(tokens, segments, positions, sample_ids, visits, *edit, impl))


def _check(tokens, segments, positions, sample_ids, visits, capacity, impl, **others):
    tensors = {
        "tokens": (tokens, "RL", INT64),
        "segments": (segments, "RL", INT64),
        "positions": (positions, "RL", INT64),
        "sample_ids": (sample_ids, "S", INT64),
        "visits": (visits, "S", INT64),
    }
    check(tensors | others, impl)
    check_count("capacity", capacity)


@torch.library.custom_op("fused_objectives::edit_tokens", mutates_args=())
def _edit(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    bound: int,
    seed: int,
    stream: str,
    is_ordinary: torch.Tensor | None,
    ordinary_ids: torch.Tensor | None,
    insert_id: int | None,
    pad_id: int,
    capacity: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    segments = checked(segments, len(sample_ids), within_rows=True)
    arguments = (bound, seed, stream, is_ordinary, ordinary_ids, insert_id, pad_id, capacity)
    run = edit_triton if uses_triton(impl, tokens) else edit_torch
    return run(tokens, segments, positions, sample_ids, visits, *arguments)


@_edit.register_fake
def _(tokens, segments, positions, sample_ids, visits, *rest):
    capacity = rest[-2]
    rows = tuple(tokens.new_empty(tokens.shape[0], capacity) for _ in range(5))
    return *rows, torch.empty_like(sample_ids), torch.empty_like(sample_ids)


def edit_torch(
    tokens,
    segments,
    positions,
    sample_ids,
    visits,
    bound,
    seed,
    stream,
    is_ordinary,
    ordinary_ids,
    insert_id,
    pad_id,
    capacity,
):
    """The op in plain torch. With ``is_ordinary`` a token whose word 0 is below ``bound`` is deleted, without it
    one is inserted before."""
    rows, length = tokens.shape
    real = segments >= 0
    choose, _, pick, _ = words(seed, stream, positions, segments, sample_ids, visits)
    drawn = real & (choose < bound)
    if is_ordinary is None:
        inserted = drawn & (positions > 0)
        emitted, gap = real.long() + inserted, torch.zeros_like(real)
    else:
        deleted = drawn & is_ordinary[tokens]
        emitted, gap = (real & ~deleted).long(), torch.zeros_like(real)
        gap[:, 1:] = deleted[:, :-1] & (segments[:, :-1] == segments[:, 1:])

    ends = emitted.cumsum(1)  # each token's place in the row is the one before its end
    begins = real.clone()
    begins[:, 1:] &= segments[:, :-1] != segments[:, 1:]
    starts = torch.where(begins, ends - emitted, 0).cummax(1).values if length else ends  # of the samples
    result = [tokens.new_full((rows * capacity,), padding) for padding in (pad_id, -1, 0, IGNORED, -1)]
    ends_in_result = (torch.arange(rows, device=tokens.device)[:, None] * capacity + ends).flatten()

    def put(which, before_end, *values):
        chosen = (which & (ends - before_end < capacity)).flatten().nonzero().squeeze(1)
        places = ends_in_result[chosen] - before_end
        for array, value in zip(result, values, strict=True):
            array[places] = value.flatten()[chosen] if isinstance(value, torch.Tensor) else value

    put(
        emitted > 0,
        1,
        tokens,
        segments,
        ends - 1 - starts,
        gap.long(),
        torch.arange(rows * length, device=tokens.device),
    )
    if is_ordinary is None:
        new = insert_id if insert_id is not None else ordinary_ids[below(pick, len(ordinary_ids))]
        put(inserted, 2, new, segments, ends - 2 - starts, 1, -1)

    fits = ends.clamp(max=capacity) - (ends - emitted).clamp(max=capacity)
    counts = tokens.new_zeros(2, len(sample_ids) + 1)
    counts.index_add_(1, segments.flatten() + 1, torch.stack([fits, emitted - fits]).view(2, -1))
    lengths, dropped = counts[:, 1:]
    return *(array.view(rows, capacity) for array in result), lengths.clone(), dropped.clone()


def edit_triton(
    tokens,
    segments,
    positions,
    sample_ids,
    visits,
    bound,
    seed,
    stream,
    is_ordinary,
    ordinary_ids,
    insert_id,
    pad_id,
    capacity,
    block=_BLOCK,
):
    """Launch the kernel."""
    rows, length = tokens.shape
    result = [tokens.new_empty(rows, capacity) for _ in range(5)]
    lengths, dropped = torch.zeros_like(sample_ids), torch.zeros_like(sample_ids)  # as of samples without a token
    if rows:
        edit_kernel[(rows,)](
            tokens.contiguous(),
            segments.contiguous(),
            positions.contiguous(),
            sample_ids.contiguous(),
            visits.contiguous(),
            None if is_ordinary is None else is_ordinary.contiguous(),
            None if insert_id is not None or ordinary_ids is None else ordinary_ids.contiguous(),
            *result,
            lengths,
            dropped,
            length,
            len(sample_ids),
            capacity,
            0 if ordinary_ids is None else len(ordinary_ids),
            bound,
            seed,
            stream_id(stream),
            insert_id or 0,
            pad_id,
            IGNORED=IGNORED,
            BLOCK=block,
        )
    return *result, lengths, dropped


_SCALARS = ["length", "samples", "capacity", "ordinary", "bound", "seed", "stream", "insert_id", "pad_id"]


@jit
def _maximum(one, other):
    return tl.maximum(one, other)


@jit(do_not_specialize=_SCALARS)
def edit_kernel(
    tokens_ptr,
    segments_ptr,
    positions_ptr,
    sample_ids_ptr,
    visits_ptr,
    is_ordinary_ptr,
    ordinary_ids_ptr,
    new_tokens_ptr,
    new_segments_ptr,
    new_positions_ptr,
    labels_ptr,
    sources_ptr,
    lengths_ptr,
    dropped_ptr,
    length: tl.int64,
    samples: tl.int64,
    capacity: tl.int64,
    ordinary: tl.int64,
    bound: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    insert_id: tl.int64,
    pad_id: tl.int64,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. ``is_ordinary`` deletes, its absence inserts.

    Each original token emits 0, 1 or 2 tokens, the last of them itself; ``end`` runs over the tokens emitted so far,
    ``start`` is what it was when the sample began. A sample's last token writes its counts.
    """
    row = tl.program_id(0).to(tl.int64)
    end = row * 0
    start = row * 0
    for first in range(0, length, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        here = columns < length
        places = row * length + columns
        tokens = tl.load(tokens_ptr + places, mask=here, other=0)
        segments = tl.load(segments_ptr + places, mask=here, other=-1)
        before = tl.load(segments_ptr + places - 1, mask=here & (columns > 0), other=-1)
        after = tl.load(segments_ptr + places + 1, mask=columns + 1 < length, other=-1)
        real = (segments >= 0) & (segments < samples)
        positions = tl.load(positions_ptr + places, mask=real, other=0)
        choose, _, pick, _ = token_words(seed, stream, positions, segments, real, sample_ids_ptr, visits_ptr)
        drawn = real & (choose.to(tl.int64) < bound)
        if is_ordinary_ptr is None:
            inserted = drawn & (positions > 0)
            emitted = real.to(tl.int64) + inserted.to(tl.int64)
            labels = tl.zeros([BLOCK], tl.int64)
        else:
            emitted = (real & ((drawn & _is_ordinary(is_ordinary_ptr, tokens, real)) == 0)).to(tl.int64)
            # Whether the token before was deleted is drawn again, which is cheaper than handing it on.
            follows = real & (before == segments)
            previous = tl.load(tokens_ptr + places - 1, mask=follows, other=0)
            choose, _, _, _ = token_words(
                seed,
                stream,
                tl.load(positions_ptr + places - 1, mask=follows, other=0),
                segments,
                follows,
                sample_ids_ptr,
                visits_ptr,
            )
            gap = follows & (choose.to(tl.int64) < bound) & _is_ordinary(is_ordinary_ptr, previous, follows)
            labels = gap.to(tl.int64)

        ends = end + tl.cumsum(emitted)
        starts = tl.where(real & (segments != before), ends - emitted, 0)
        starts = tl.maximum(tl.associative_scan(starts, 0, _maximum), start)
        base = row * capacity - 1
        kept = (emitted > 0) & (ends <= capacity)
        tl.store(new_tokens_ptr + base + ends, tokens, mask=kept)
        tl.store(new_segments_ptr + base + ends, segments, mask=kept)
        tl.store(new_positions_ptr + base + ends, ends - 1 - starts, mask=kept)
        tl.store(labels_ptr + base + ends, labels, mask=kept)
        tl.store(sources_ptr + base + ends, places, mask=kept)
        if is_ordinary_ptr is None:
            base -= 1
            kept = inserted & (ends - 1 <= capacity)
            new = tl.zeros([BLOCK], tl.int64) + insert_id
            if ordinary_ids_ptr is not None:
                new = tl.load(ordinary_ids_ptr + ((pick.to(tl.int64) * ordinary) >> 32), mask=kept, other=0)
            tl.store(new_tokens_ptr + base + ends, new, mask=kept)
            tl.store(new_segments_ptr + base + ends, segments, mask=kept)
            tl.store(new_positions_ptr + base + ends, ends - 2 - starts, mask=kept)
            tl.store(labels_ptr + base + ends, labels + 1, mask=kept)
            tl.store(sources_ptr + base + ends, tl.full([BLOCK], -1, tl.int64), mask=kept)

        last = real & (segments != after)
        fit = tl.minimum(ends, capacity) - tl.minimum(starts, capacity)
        tl.store(lengths_ptr + segments, fit, mask=last)
        tl.store(dropped_ptr + segments, ends - starts - fit, mask=last)
        end += tl.sum(emitted)
        start = tl.max(starts)

    for first in range(end, capacity, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        places, rest = row * capacity + columns, columns < capacity
        tl.store(new_tokens_ptr + places, tl.zeros([BLOCK], tl.int64) + pad_id, mask=rest)
        tl.store(new_segments_ptr + places, tl.full([BLOCK], -1, tl.int64), mask=rest)
        tl.store(new_positions_ptr + places, tl.zeros([BLOCK], tl.int64), mask=rest)
        tl.store(labels_ptr + places, tl.full([BLOCK], IGNORED, tl.int64), mask=rest)
        tl.store(sources_ptr + places, tl.full([BLOCK], -1, tl.int64), mask=rest)


@jit
def _is_ordinary(is_ordinary_ptr, tokens, mask):
    return tl.load(is_ordinary_ptr + tokens, mask=mask, other=0).to(tl.int1)


_INPUTS = ("tokens", "segments", "positions", "sample_ids", "visits")
_RESULTS = ("new_tokens", "new_segments", "new_positions", "labels", "sources", "lengths", "dropped")
CONFIGURATIONS = [
    Configuration(
        edit_kernel,
        {f"{name}_ptr": "*i64" for name in (*_INPUTS, *_RESULTS)} | given | dict.fromkeys(_SCALARS, "i64"),
        {name: None for name in ("is_ordinary_ptr", "ordinary_ids_ptr") if name not in given}
        | {"IGNORED": IGNORED, "BLOCK": _BLOCK},
    )
    for given in ({}, {"ordinary_ids_ptr": "*i64"}, {"is_ordinary_ptr": "*i1"})
]
