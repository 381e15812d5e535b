"""Masking: the corruption of masked language models, of single tokens, whole words or spans.

Tokens are chosen by *units*: a unit is a token, or a word if the caller numbers them. A span of units starts at unit j
with a probability q and has a length of its own; all its units are chosen.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton
from fused_objectives.checks import BOOL, INT64, check, layout
from fused_objectives.draws import threshold, words
from fused_objectives.philox import below, philox_words, stream_id
from fused_objectives.segments import checked
from fused_objectives.targets import IGNORED

_BLOCK = 256


class Masked(NamedTuple):
    """A corrupted batch."""

    tokens: torch.Tensor
    """Like the input, int64: what the model reads."""
    labels: torch.Tensor
    """Like the input, int64: the original token where it was chosen, :data:`IGNORED` elsewhere."""


def mask_tokens(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    *,
    seed: int,
    stream: str,
    is_ordinary: torch.Tensor,
    ordinary_ids: torch.Tensor,
    mask_id: int,
    rate: float,
    mask_share: float,
    random_share: float,
    eligible: torch.Tensor | None = None,
    units: torch.Tensor | None = None,
    span_lengths: Sequence[float] = (1.0,),
    impl: str = "auto",
) -> Masked:
    """Hide tokens (arXiv 1810.04805), whole words, or spans (arXiv 1907.10529).

    A span starts at unit j iff word 0 of the call (j, sample, visit) is below q·2³², and its word 3 decides the
    length; spans may start before a sample's first unit, so that all units are covered with one probability, ``rate``.
    What becomes of a chosen token is decided by words 1 and 2 of its own call (position, sample, visit). Special
    tokens and padding are neither chosen nor drawn.

    Args:
        tokens, segments, positions: int64 of one shape, ``[N]`` or ``[rows, length]``: token ids; which sample a token
            belongs to (a sample's tokens are one contiguous run; −1 is padding); position within the sample.
        sample_ids, visits: ``[S]`` int64.
        seed, stream: key of the random numbers.
        is_ordinary: ``[V]`` bool, which tokens may be hidden.
        ordinary_ids: ``[n]`` int64, the tokens that may replace others.
        mask_id: the mask token.
        rate: probability that a unit is chosen.
        mask_share, random_share: fraction of the chosen tokens that become the mask token, or a random one; the others
            stay as they are.
        eligible: bool in the shape of ``tokens``, further bounds what is chosen.
        units: int64 in the shape of ``tokens``, each token's unit within its sample, −1 in none (never chosen). None
            takes the positions.
        span_lengths: probability that a span has 1, 2, … units.

    Bytes: 24 read and 16 written a token. One Philox call a token, with units or spans one more for each span length.

    Raises:
        ValueError: if a rate, share or span length is no probability, or there is no token to replace others with; for
            shapes, dtypes or segments that are not so.
    """
    all_tokens = layout(tokens)
    tensors = {
        "tokens": (tokens, all_tokens, INT64),
        "segments": (segments, all_tokens, INT64),
        "positions": (positions, all_tokens, INT64),
        "sample_ids": (sample_ids, "S", INT64),
        "visits": (visits, "S", INT64),
        "is_ordinary": (is_ordinary, "V", BOOL),
        "ordinary_ids": (ordinary_ids, "n", INT64),
        "eligible": (eligible, all_tokens, BOOL),
        "units": (units, all_tokens, INT64),
    }
    check(tensors, impl)
    if random_share > 0 and len(ordinary_ids) == 0:
        raise ValueError("ordinary_ids: no token to replace others with")
    if min(span_lengths) < 0 or abs(sum(span_lengths) - 1) > 1e-6:
        raise ValueError(f"span_lengths {tuple(span_lengths)} do not sum to 1")
    thresholds = [
        threshold(start_rate(rate, tuple(span_lengths))),
        threshold(mask_share),
        threshold(mask_share + random_share),
    ]
    return Masked(
        *_mask(
            tokens,
            segments,
            positions,
            sample_ids,
            visits,
            seed & 0xFFFFFFFF,
            stream,
            is_ordinary,
            ordinary_ids,
            mask_id,
            thresholds,
            eligible,
            units,
            [threshold(shorter) for shorter in accumulate(span_lengths[:-1], initial=0.0)],
            impl,
        )
    )


def start_rate(rate: float, span_lengths: tuple[float, ...]) -> float:
    """Return the probability q that a span starts at a unit, for which a unit is covered with probability ``rate``:
    1 − Π_k (1 − q·P(length > k)) = rate."""
    return rate if len(span_lengths) == 1 else _solve(rate, span_lengths)


@lru_cache
def _solve(rate: float, span_lengths: tuple[float, ...]) -> float:
    longer = [1.0 - shorter for shorter in accumulate(span_lengths[:-1], initial=0.0)]
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        if prod(1 - middle * probability for probability in longer) > 1 - rate:
            low = middle
        else:
            high = middle
    return high


@torch.library.custom_op("fused_objectives::mask_tokens", mutates_args=())
def _mask(
    tokens: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    sample_ids: torch.Tensor,
    visits: torch.Tensor,
    seed: int,
    stream: str,
    is_ordinary: torch.Tensor,
    ordinary_ids: torch.Tensor,
    mask_id: int,
    thresholds: Sequence[int],
    eligible: torch.Tensor | None,
    units: torch.Tensor | None,
    reaches: Sequence[int],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    segments = checked(segments, len(sample_ids))
    arguments = (tokens, segments, positions, sample_ids, visits, seed, stream, is_ordinary, ordinary_ids, mask_id)
    run = mask_triton if uses_triton(impl, tokens) else mask_torch
    return run(*arguments, thresholds, eligible, units, reaches)


@_mask.register_fake
def _(tokens, *_):
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape)


def mask_torch(
    tokens,
    segments,
    positions,
    sample_ids,
    visits,
    seed,
    stream,
    is_ordinary,
    ordinary_ids,
    mask_id,
    thresholds,
    eligible,
    units,
    reaches,
):
    """The op in plain torch; ``thresholds`` for start, mask, mask or random; ``reaches`` see :func:`mask_kernel`."""
    start, mask, random = thresholds
    choose, kind, replacement, _ = words(seed, stream, positions, segments, sample_ids, visits)
    chosen = (segments >= 0) & is_ordinary[tokens]
    if units is None and len(reaches) == 1:
        chosen &= choose < start
    else:
        units = positions if units is None else units
        chosen &= units >= 0
        chosen &= _in_span(units, segments, chosen, sample_ids, visits, seed, stream, start, reaches)
    if eligible is not None:
        chosen &= eligible
    drawn = ordinary_ids[below(replacement, len(ordinary_ids))] if len(ordinary_ids) else tokens
    corrupted = torch.where(chosen & (kind < random), drawn, tokens)
    corrupted = torch.where(chosen & (kind < mask), mask_id, corrupted)
    return corrupted, torch.where(chosen, tokens, IGNORED)


def _in_span(units, segments, real, sample_ids, visits, seed, stream, start, reaches):
    """Return which tokens' units lie in a span. All units are listed, sample after sample, so that each is drawn once;
    before each sample's first come as many as a span may reach from."""
    before = len(reaches) - 1
    places = real.flatten().nonzero().squeeze(1)
    owner, unit = segments.flatten()[places], units.flatten()[places]
    sizes = unit.new_zeros(len(sample_ids)).scatter_reduce(0, owner, unit + 1, "amax")
    sizes = torch.where(sizes > 0, sizes + before, 0)
    ends = sizes.cumsum(0)
    samples = torch.repeat_interleave(sizes)
    listed = torch.arange(len(samples), device=units.device) - (ends - sizes)[samples] - before
    starts, _, _, length = words(seed, stream, listed, samples, sample_ids, visits)
    starts = starts < start
    covered = starts.clone()
    for back in range(1, min(before + 1, len(covered))):
        covered[back:] |= (starts & (length >= reaches[back]))[:-back]
    inside = torch.zeros_like(real).flatten()
    inside[places] = covered[(ends - sizes)[owner] + before + unit]
    return inside.view_as(real)


def mask_triton(
    tokens,
    segments,
    positions,
    sample_ids,
    visits,
    seed,
    stream,
    is_ordinary,
    ordinary_ids,
    mask_id,
    thresholds,
    eligible,
    units,
    reaches,
    block=_BLOCK,
):
    """Launch the kernel."""
    tokens = tokens.contiguous()
    corrupted, labels = torch.empty_like(tokens), torch.empty_like(tokens)
    if tokens.numel() == 0:
        return corrupted, labels
    if units is not None or len(reaches) > 1:
        reaches, spans = _on_device(tuple(reaches), tokens.device), len(reaches)
    else:
        reaches, spans = None, 0
    mask_kernel[(-(-tokens.numel() // block),)](
        tokens,
        segments.contiguous(),
        positions.contiguous(),
        sample_ids.contiguous(),
        visits.contiguous(),
        is_ordinary.contiguous(),
        ordinary_ids.contiguous(),
        None if eligible is None else eligible.contiguous(),
        None if units is None else units.contiguous(),
        reaches,
        corrupted,
        labels,
        tokens.numel(),
        len(sample_ids),
        len(ordinary_ids),
        spans,
        seed,
        stream_id(stream),
        mask_id,
        *thresholds,
        IGNORED=IGNORED,
        BLOCK=block,
    )
    return corrupted, labels


@lru_cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return an int64 tensor, copied once, since copying makes the host wait."""
    return torch.tensor(numbers, device=device)


_SCALARS = ["total", "samples", "ordinary", "spans", "seed", "stream", "mask_id", "start", "mask", "random"]


@jit(do_not_specialize=_SCALARS)
def mask_kernel(
    tokens_ptr,
    segments_ptr,
    positions_ptr,
    sample_ids_ptr,
    visits_ptr,
    is_ordinary_ptr,
    ordinary_ids_ptr,
    eligible_ptr,
    units_ptr,
    reaches_ptr,
    corrupted_ptr,
    labels_ptr,
    total: tl.int64,
    samples: tl.int64,
    ordinary: tl.int64,
    spans: tl.int64,
    seed: tl.int64,
    stream: tl.int64,
    mask_id: tl.int64,
    start: tl.int64,
    mask: tl.int64,
    random: tl.int64,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens.

    A span that starts k units back reaches a token iff its word 3 is at least ``reaches[k]``, ``spans`` in number:
    threshold(P(length ≤ k)). Without ``reaches`` a token is its own span.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = places < total
    tokens = tl.load(tokens_ptr + places, mask=here, other=0)
    segments = tl.load(segments_ptr + places, mask=here, other=-1)
    real = (segments >= 0) & (segments < samples)
    positions = tl.load(positions_ptr + places, mask=real, other=0)
    chosen = real & tl.load(is_ordinary_ptr + tokens, mask=real, other=0).to(tl.int1)
    if eligible_ptr is not None:
        chosen &= tl.load(eligible_ptr + places, mask=real, other=0).to(tl.int1)

    sample = tl.load(sample_ids_ptr + segments, mask=real, other=0)
    visit = tl.load(visits_ptr + segments, mask=real, other=0)
    choose, kind, replacement, _ = philox_words(seed, stream, positions, sample, visit)
    if reaches_ptr is None:
        chosen &= choose.to(tl.int64) < start
    else:
        units = positions
        if units_ptr is not None:
            units = tl.load(units_ptr + places, mask=real, other=-1)
        covered = units < units
        for back in range(spans):
            starts, _, _, length = philox_words(seed, stream, units - back, sample, visit)
            reached = length.to(tl.int64) >= tl.load(reaches_ptr + back)
            covered |= (starts.to(tl.int64) < start) & reached
        chosen &= covered & (units >= 0)

    kind = kind.to(tl.int64)
    becomes_random = chosen & (kind >= mask) & (kind < random)
    drawn = tl.load(ordinary_ids_ptr + ((replacement.to(tl.int64) * ordinary) >> 32), mask=becomes_random, other=0)
    corrupted = tl.where(becomes_random, drawn, tokens)
    corrupted = tl.where(chosen & (kind < mask), mask_id, corrupted)
    tl.store(corrupted_ptr + places, corrupted, mask=here)
    tl.store(labels_ptr + places, tl.where(chosen, tokens, IGNORED), mask=here)


_ARRAYS = ("tokens", "segments", "positions", "sample_ids", "visits", "ordinary_ids", "corrupted", "labels")
CONFIGURATIONS = [
    Configuration(
        mask_kernel,
        {f"{name}_ptr": "*i64" for name in (*_ARRAYS, *given)}
        | {"is_ordinary_ptr": "*i1"}
        | ({"eligible_ptr": "*i1"} if eligible else {})
        | dict.fromkeys(_SCALARS, "i64"),
        {f"{name}_ptr": None for name in ("units", "reaches") if name not in given}
        | ({} if eligible else {"eligible_ptr": None})
        | {"IGNORED": IGNORED, "BLOCK": _BLOCK},
    )
    for given in ((), ("reaches",), ("units", "reaches"))
    for eligible in (False, True)
]
