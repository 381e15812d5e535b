"""Samples within a flat run of tokens: where each begins and ends, and sums over each.

A *segment id* says which of S samples a token belongs to; −1 is padding. A sample's tokens are one contiguous run; runs
may come in any order, with padding between them.

Ops check that on the CPU. A GPU could not be asked without making the host wait: there an id out of range counts as
padding, and of a sample in several runs nothing is certain but that no memory besides the results is written.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check

_BLOCK = 256


def checked(segments: torch.Tensor, samples: int, name: str = "segments", within_rows: bool = False) -> torch.Tensor:
    """Return segment ids as int64; on the CPU, after checking them.

    Args:
        segments: integers of any shape, for −1 .. S − 1.
        samples: S.
        name: of the argument.
        within_rows: runs may not go on from one row of ``segments [rows, length]`` to the next.

    Raises:
        ValueError: for an id out of range, or a sample in several runs.
    """
    segments = segments.long()
    if segments.is_cuda or torch.compiler.is_compiling():
        return segments
    found = torch.unique_consecutive(F.pad(segments, (0, 1), value=-1) if within_rows else segments).tolist()
    for wrong in (min(found, default=-1), max(found, default=-1)):
        if not -1 <= wrong < samples:
            raise ValueError(f"{name}: {wrong} is not within -1 and {samples - 1}")
    found = [sample for sample in found if sample >= 0]
    if len(set(found)) < len(found):
        twice = next(sample for sample, other in pairwise(sorted(found)) if sample == other)
        raise ValueError(f"{name}: the tokens of sample {twice} are not one contiguous run")
    return segments


def owners(segments: torch.Tensor, samples: int) -> torch.Tensor:
    """Return each token's sample, int64, and S where there is none."""
    return torch.where(segments < 0, samples, segments).clamp(max=samples).long()


def spans(segments: torch.Tensor, samples: int, impl: str = "torch") -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each sample's run starts and ends (first token, one behind the last), both ``[S]`` int64.

    Args:
        segments: ``[N]`` integers in −1 .. S − 1, one contiguous run for each sample; not checked here.
        samples: S. A sample without a token gets an empty run.
        impl: the kernel is two launches instead of nine, but can only be called where others are: within custom ops.
    """
    if len(segments) and samples and uses_triton(impl, segments):
        bounds = segments.new_zeros(2, samples, dtype=torch.int64)
        programs = -(-len(segments) // _BLOCK)
        spans_kernel[(programs,)](segments.contiguous(), bounds, len(segments), samples, BLOCK=_BLOCK)
        return bounds[0], bounds[1]
    places = torch.arange(len(segments), device=segments.device)
    owner = owners(segments, samples)
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
    """Spread ``values [S]`` over tokens, ``[N]``; padding, and ids out of range, get 0."""
    return F.pad(values, (0, 2))[segments.clamp(-1, len(values)).long()]  # −1 is the last


def row_sums(rows: torch.Tensor, segments: torch.Tensor, samples: int) -> torch.Tensor:
    """Return the sum over each sample's rows of ``rows [N, p]``, ``[S, p]`` float32; for twins.

    It is what an embedding's backward does, and no host waits for it.
    """
    return torch.ops.aten.embedding_dense_backward(
        rows.float(), owners(segments, samples), samples + 1, samples, False
    )[:samples]


@not_differentiable
def sum_per_sample(values: torch.Tensor, segments: torch.Tensor, samples: int, impl: str = "auto") -> torch.Tensor:
    """Add up ``values [N]`` over each sample's tokens, ``[S]`` float32, in an order that does not vary between calls.

    Not differentiable.

    Args:
        values: ``[N]`` floating.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding.
        samples: S.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.
    """
    check({"values": (values, "N", FLOATING), "segments": (segments, "N", INTEGER)}, impl, samples)
    return span_sums(values, checked(segments, samples), samples, impl)


def span_sums(values: torch.Tensor, segments: torch.Tensor, samples: int, impl: str) -> torch.Tensor:
    """The same within ops, which have checked their arguments; ``values`` may be bool."""
    if samples == 0 or len(values) == 0:
        return values.new_zeros(samples, dtype=torch.float32)
    if not uses_triton(impl, values):
        sums = values.new_zeros(samples + 1, dtype=torch.float32)
        return sums.index_add(0, owners(segments, samples), values.float())[:samples]
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
    exists = (segment >= 0) & (segment < samples)
    tl.store(bounds_ptr + segment, places, mask=exists & (segment != before))
    tl.store(bounds_ptr + samples + segment, places + 1, mask=exists & (segment != after))


@jit(do_not_specialize=["values_stride"])
def span_sum_kernel(values_ptr, starts_ptr, ends_ptr, sums_ptr, values_stride, BLOCK: tl.constexpr):
    """One program a sample."""
    sample = tl.program_id(0)
    start, end = tl.load(starts_ptr + sample), tl.load(ends_ptr + sample)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + places * values_stride, mask=places < end, other=0)
        total += values.to(tl.float32)
    tl.store(sums_ptr + sample, tl.sum(total))


CONFIGURATIONS = [
    Configuration(
        spans_kernel,
        {"segments_ptr": "*i64", "bounds_ptr": "*i64", "tokens": "i32", "samples": "i32"},
        {"BLOCK": _BLOCK},
    ),
    *(
        Configuration(
            span_sum_kernel,
            {"values_ptr": values, "starts_ptr": "*i64", "ends_ptr": "*i64", "sums_ptr": "*fp32"}
            | {"values_stride": "i64"},
            {"BLOCK": _BLOCK},
        )
        for values in ("*fp32", "*i1")
    ),
]
