"""What a step takes beside the model states: buckets, copies that travel, weights that are gathered.

None of it stays: what a micro-step takes goes on top of its activations, what the update takes comes when there are
none.
"""

from collections.abc import Collection

from pretrain.planning.zero import FP32, Group, Zero, gathered, largest, largest_share, muon, numel, touched

_REDUCED_AT_ONCE = 500_000_000  # elements; stage 0
_MUON_COPIES = 4  # of a matrix, in fp32, while it is orthogonalised


def in_micro_step(groups: Collection[Group], zero: Zero, ranks: int) -> int:
    """Return the bytes on one GPU that a micro-step takes beside model states and activations."""
    whole, most = numel(groups), largest(groups)
    if zero.stage == 0:
        return FP32 * most  # a gradient before it is added
    bucket = zero.reduce_bucket * zero.contiguous
    if zero.stage == 1:  # there for the update, but made in the backward
        return FP32 * (bucket + most)
    reduced = min(whole, max(zero.reduce_bucket, most))  # what is in a bucket travels as a copy
    if zero.stage == 3:
        return zero.itemsize * (bucket + reduced + gathered(groups, zero) + most)
    if not zero.contiguous:
        bucket = reduced  # gradients wait where they are
    needed = zero.itemsize * (bucket * (1 + zero.overlap) + reduced)
    if zero.offload:
        needed += zero.itemsize * most  # a sum on its way from the host
    elif not zero.bf16:
        needed += FP32 * touched(groups, ranks) * zero.contiguous  # this rank's gradients, before they are added
    return needed + FP32 * most


def in_update(groups: Collection[Group], zero: Zero, ranks: int) -> int:
    """Return the bytes on one GPU that the update takes beside model states."""
    whole, most, matrices = numel(groups), largest(groups), muon(groups)
    orthogonalised = FP32 * _MUON_COPIES * largest(matrices)
    if zero.stage == 0:
        return max(FP32 * min(whole, _REDUCED_AT_ONCE), FP32 * largest(matrices) + orthogonalised)
    norm = 8 * most  # a gradient in fp64
    if zero.offload:
        return max(norm, orthogonalised) + zero.itemsize * zero.reduce_bucket * (zero.stage == 3)
    optimized = orthogonalised + FP32 * largest_share(matrices, ranks)
    if not (zero.stage == 2 and zero.bf16):  # whose sums are flat already
        optimized += FP32 * largest_share(groups, ranks)
    bucket = zero.reduce_bucket * zero.contiguous
    if zero.stage == 1:  # gradients are given back while they are reduced
        sums = touched(groups, ranks)
        return max(norm, FP32 * (bucket + sums), FP32 * (sums - whole) + optimized)
    return max(norm, optimized) + zero.itemsize * bucket * (zero.stage == 3)
