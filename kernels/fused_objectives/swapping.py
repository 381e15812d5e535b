"""Swapping: exchanges tokens within a sample, for swapped token detection (arXiv 2305.03981)."""

from typing import NamedTuple

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton
from fused_objectives.checks import BOOL, INT64, check, layout
from fused_objectives.draws import threshold, token_words, words
from fused_objectives.philox import stream_id
from fused_objectives.segments import checked
from fused_objectives.targets import IGNORED

_BLOCK, _TILE = 256, 32


class Swapped(NamedTuple):
    """A corrupted batch."""

    tokens: torch.Tensor
    """Like the input, int64."""
    labels: torch.Tensor
    """Like the input, int64: 1 where the token differs from the original, 0 where not, :data:`IGNORED` on padding."""


def swap_tokens(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    *,
    seed: int,
    stream: str,
    is_ordinary: torch.Tensor,
    rate: float,
    eligible: torch.Tensor | None = None,
    impl: str = "auto",
) -> Swapped:
    """Choose places and permute their tokens within each sample by a uniformly random cyclic permutation.

    Word 0 of a token's call (position, sample, visit) chooses. The chosen places of a sample are put in the order of
    their words 1 (equal words in the order of the text), and each takes the token of its successor, the last that of
    the first. So no chosen place keeps its own token, unless it is the only one; but it may get an equal one.

    Args:
        tokens, segments, positions: int64 of one shape, ``[N]`` or ``[rows, length]``: token ids; which sample a token
            belongs to (a sample's tokens are one contiguous run; −1 is padding); position within the sample.
        sample_ids, visits: ``[S]`` int64.
        seed, stream: key of the random numbers.
        is_ordinary: ``[V]`` bool, which tokens may be moved.
        rate: probability that a place is chosen.
        eligible: bool in the shape of ``tokens``, further bounds what is chosen.

    Bytes: 24 read and 16 written a token, and 16 written and read again a chosen one. For c chosen places in a sample
    c² comparisons.

    Raises:
        ValueError: if the rate is no probability, and for shapes, dtypes or segments that are not so.
    """
    all_tokens = layout(tokens)
    tensors = {
        "tokens": (tokens, all_tokens, INT64),
        "segments": (segments, all_tokens, INT64),
        "positions": (positions, all_tokens, INT64),
        "sample_ids": (sample_ids, "S", INT64),
        "visits": (visits, "S", INT64),
        "is_ordinary": (is_ordinary, "V", BOOL),
        "eligible": (eligible, all_tokens, BOOL),
    }
    check(tensors, impl)
    chances = threshold(rate), seed & 0xFFFFFFFF, stream
    return Swapped(*_swap(tokens, segments, positions, sample_ids, visits, *chances, is_ordinary, eligible, impl))


@torch.library.custom_op("fused_objectives::swap_tokens", mutates_args=())
def _swap(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    below: int,
    seed: int,
    stream: str,
    is_ordinary: torch.Tensor,
    eligible: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    segments = checked(segments, len(sample_ids))
    run = swap_triton if uses_triton(impl, tokens) else swap_torch
    return run(tokens, segments, positions, sample_ids, visits, below, seed, stream, is_ordinary, eligible)


@_swap.register_fake
def _(tokens, *_):
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)


def swap_torch(tokens, segments, positions, sample_ids, visits, below, seed, stream, is_ordinary, eligible):
    """The op in plain torch; a token is chosen if its word 0 is ``below``."""
    choose, order, _, _ = words(seed, stream, positions, segments, sample_ids, visits)
    chosen = (segments >= 0) & is_ordinary[tokens] & (choose < below)
    if eligible is not None:
        chosen &= eligible
    places = chosen.flatten().nonzero().squeeze(1)
    places = places[order.flatten()[places].argsort(stable=True)]
    owner, by_sample = segments.flatten()[places].sort(stable=True)
    places = places[by_sample]
    first, end = torch.searchsorted(owner, owner), torch.searchsorted(owner, owner, right=True)
    successor = torch.arange(1, len(places) + 1, device=places.device)
    successor = torch.where(successor == end, first, successor)
    flat = tokens.flatten()
    swapped = flat.scatter(0, places, flat[places[successor]]).view_as(tokens)
    return swapped, torch.where(segments < 0, IGNORED, swapped != tokens)


def swap_triton(
    tokens,
    segments,
    positions,
    sample_ids,
    visits,
    below,
    seed,
    stream,
    is_ordinary,
    eligible,
    block=_BLOCK,
    tile=_TILE,
):
    """Launch the kernel."""
    tokens = tokens.contiguous()
    swapped, labels, keys = (torch.empty_like(tokens) for _ in range(3))
    if tokens.numel() == 0:
        return swapped, labels
    swap_kernel[(-(-tokens.numel() // block),)](
        tokens,
        segments.contiguous(),
        positions.contiguous(),
        sample_ids.contiguous(),
        visits.contiguous(),
        is_ordinary.contiguous(),
        None if eligible is None else eligible.contiguous(),
        keys,
        swapped,
        labels,
        tokens.numel(),
        len(sample_ids),
        below,
        seed,
        stream_id(stream),
        IGNORED=IGNORED,
        BLOCK=block,
        TILE=tile,
    )
    return swapped, labels


_SCALARS = ["total", "samples", "below", "seed", "stream"]


@jit(do_not_specialize=_SCALARS)
def swap_kernel(
    tokens_ptr,
    segments_ptr,
    positions_ptr,
    sample_ids_ptr,
    visits_ptr,
    is_ordinary_ptr,
    eligible_ptr,
    keys_ptr,
    swapped_ptr,
    labels_ptr,
    total: tl.int64,
    samples: tl.int64,
    below: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a block of places: the padding within, and the samples that begin within, one after another.

    A chosen place's key is its word 1, then its offset in the sample. A first pass over the sample writes the tokens
    that stay, and the keys of the others, close together, where the sample stands in ``keys``; a second one finds each
    key's cyclic successor, the least key above it or the least of all. (Words of 2³¹ and above make a key negative,
    which turns the cycle's order, and so changes no successor.)
    """
    NONE: tl.constexpr = 2**63 - 1
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    owners = tl.load(segments_ptr + here, mask=here < total, other=-1)
    real = (owners >= 0) & (owners < samples)
    padding = (here < total) & (real == 0)
    tl.store(swapped_ptr + here, tl.load(tokens_ptr + here, mask=padding), mask=padding)
    tl.store(labels_ptr + here, tl.full([BLOCK], IGNORED, tl.int64), mask=padding)

    begins = real & (owners != tl.load(segments_ptr + here - 1, mask=(here > 0) & (here < total), other=-1))
    start = tl.min(tl.where(begins, here, NONE))
    while start != NONE:
        owner = tl.load(segments_ptr + start)
        chosen_before = start * 0
        first = start
        goes_on = start >= 0
        while goes_on:
            places = first + tl.arange(0, BLOCK)
            segments = tl.load(segments_ptr + places, mask=places < total, other=-1)
            mine = segments == owner
            tokens = tl.load(tokens_ptr + places, mask=mine, other=0)
            positions = tl.load(positions_ptr + places, mask=mine, other=0)
            chosen = mine & tl.load(is_ordinary_ptr + tokens, mask=mine, other=0).to(tl.int1)
            if eligible_ptr is not None:
                chosen &= tl.load(eligible_ptr + places, mask=mine, other=0).to(tl.int1)
            choose, order, _, _ = token_words(seed, stream, positions, segments, mine, sample_ids_ptr, visits_ptr)
            chosen &= choose.to(tl.int64) < below
            ranks = chosen_before + tl.cumsum(chosen.to(tl.int64)) - 1
            tl.store(keys_ptr + start + ranks, (order.to(tl.int64) << 32) | (places - start), mask=chosen)
            tl.store(swapped_ptr + places, tokens, mask=mine & (chosen == 0))
            tl.store(labels_ptr + places, tl.zeros([BLOCK], tl.int64), mask=mine & (chosen == 0))
            chosen_before += tl.sum(chosen.to(tl.int64))
            goes_on = tl.sum(mine.to(tl.int32)) == BLOCK
            first += BLOCK

        tl.debug_barrier()  # other threads read the keys
        for row in range(0, chosen_before, TILE):
            rows = row + tl.arange(0, TILE)
            keys = tl.load(keys_ptr + start + rows, mask=rows < chosen_before, other=NONE)
            above, least = tl.full([TILE], NONE, tl.int64), tl.full([TILE], NONE, tl.int64)
            for column in range(0, chosen_before, TILE):
                columns = column + tl.arange(0, TILE)
                others = tl.load(keys_ptr + start + columns, mask=columns < chosen_before, other=NONE)
                higher = tl.where(others[None, :] > keys[:, None], others[None, :], NONE)
                above = tl.minimum(above, tl.min(higher, 1))
                least = tl.minimum(least, tl.min(others))
            successors = tl.where(above == NONE, least, above)
            inside = rows < chosen_before
            old = tl.load(tokens_ptr + start + (keys & 0xFFFFFFFF), mask=inside)
            new = tl.load(tokens_ptr + start + (successors & 0xFFFFFFFF), mask=inside)
            tl.store(swapped_ptr + start + (keys & 0xFFFFFFFF), new, mask=inside)
            tl.store(labels_ptr + start + (keys & 0xFFFFFFFF), (new != old).to(tl.int64), mask=inside)
        start = tl.min(tl.where(begins & (here > start), here, NONE))


_ARRAYS = ("tokens", "segments", "positions", "sample_ids", "visits", "keys", "swapped", "labels")
CONFIGURATIONS = [
    Configuration(
        swap_kernel,
        {f"{name}_ptr": "*i64" for name in _ARRAYS}
        | {"is_ordinary_ptr": "*i1"}
        | ({"eligible_ptr": "*i1"} if eligible else {})
        | dict.fromkeys(_SCALARS, "i64"),
        ({} if eligible else {"eligible_ptr": None}) | {"IGNORED": IGNORED, "BLOCK": _BLOCK, "TILE": _TILE},
    )
    for eligible in (False, True)
]
