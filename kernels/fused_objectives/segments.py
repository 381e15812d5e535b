"""Samples within a flat run of tokens: where each begins and ends, and sums over each.

A *segment id* says which of S samples a token belongs to; −1 is padding. The tokens of a sample are one contiguous run;
runs may come in any order, with padding between them.
"""

from collections.abc import Iterator

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton

_BLOCK = 256


def spans(segments: torch.Tensor, samples: int, impl: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each sample's run starts and ends (first token, one behind the last), both ``[S]`` int64.

    Args:
        segments: ``[N]`` integers in −1 .. S − 1.
        samples: S. A sample without a token gets an empty run.
        impl: the kernel is two launches instead of nine, but can only be called where others are: within custom ops.
    """
    if len(segments) and samples and uses_triton(impl, segments):
        bounds = segments.new_zeros(2, samples, dtype=torch.int64)
        programs = -(-len(segments) // _BLOCK)
        spans_kernel[(programs,)](segments.contiguous(), bounds, len(segments), samples, BLOCK=_BLOCK)
        return bounds[0], bounds[1]
    places = torch.arange(len(segments), device=segments.device)
    owner = torch.where(segments < 0, samples, segments).long()
    starts = places.new_full((samples + 1,), len(segments)).scatter_reduce(0, owner, places, "amin")
    ends = places.new_zeros(samples + 1).scatter_reduce(0, owner, places + 1, "amax")
    return torch.minimum(starts, ends)[:samples], ends[:samples]


def runs(segments: torch.Tensor, *arrays: torch.Tensor) -> Iterator[tuple]:
    """Yield ``(sample, rows, ...)`` for each sample that has tokens, with its rows of every array ``[N, ...]``.

    The host waits for the bounds: this is for twins.
    """
    owners, lengths = (each.tolist() for each in segments.unique_consecutive(return_counts=True))
    pieces = zip(owners, *(array.split(lengths) for array in arrays), strict=True)
    return (piece for piece in pieces if piece[0] >= 0)


def per_token(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Spread ``values [S]`` over tokens, ``[N]``; padding gets 0."""
    if len(values) == 0:
        return values.new_zeros(segments.shape)
    return torch.where(segments < 0, 0, values[segments.clamp(min=0)])


def sum_per_sample(values: torch.Tensor, segments: torch.Tensor, samples: int, impl: str = "auto") -> torch.Tensor:
    """Add up ``values [N]`` over each sample's tokens, ``[S]`` float32, in an order that does not vary between calls.

    Not differentiable.
    """
    if samples == 0 or len(values) == 0:
        return values.new_zeros(samples, dtype=torch.float32)
    if not uses_triton(impl, values):
        sums = values.new_zeros(samples + 1, dtype=torch.float32)
        owner = torch.where(segments < 0, samples, segments).long()
        return sums.index_add(0, owner, values.float())[:samples]
    sums = values.new_empty(samples, dtype=torch.float32)
    starts, ends = spans(segments, samples, impl)
    span_sum_kernel[(samples,)](values, starts, ends, sums, values.stride(0), BLOCK=_BLOCK)
    return sums


@jit(do_not_specialize=["tokens", "samples"])
def spans_kernel(segments_ptr, bounds_ptr, tokens, samples, BLOCK: tl.constexpr):
    """A block of tokens a program: the first and the last of a run write where it begins and ends."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.load(segments_ptr + places, mask=places < tokens, other=-1)
    before = tl.load(segments_ptr + places - 1, mask=(places > 0) & (places < tokens), other=-1)
    after = tl.load(segments_ptr + places + 1, mask=places + 1 < tokens, other=-1)
    tl.store(bounds_ptr + segment, places, mask=(segment >= 0) & (segment != before))
    tl.store(bounds_ptr + samples + segment, places + 1, mask=(segment >= 0) & (segment != after))


@jit(do_not_specialize=["values_stride"])
def span_sum_kernel(values_ptr, starts_ptr, ends_ptr, sums_ptr, values_stride, BLOCK: tl.constexpr):
    """One program a sample."""
    sample = tl.program_id(0)
    start, end = tl.load(starts_ptr + sample), tl.load(ends_ptr + sample)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + places * values_stride, mask=places < end, other=0.0)
        total += values.to(tl.float32)
    tl.store(sums_ptr + sample, tl.sum(total))


CONFIGURATIONS = [
    Configuration(
        spans_kernel,
        {"segments_ptr": "*i64", "bounds_ptr": "*i64", "tokens": "i32", "samples": "i32"},
        {"BLOCK": _BLOCK},
    ),
    Configuration(
        span_sum_kernel,
        {"values_ptr": "*fp32", "starts_ptr": "*i64", "ends_ptr": "*i64", "sums_ptr": "*fp32", "values_stride": "i64"},
        {"BLOCK": _BLOCK},
    ),
]
