"""Unbiased estimates of per-sample gradient norms at the cost of two skinny products."""

import torch

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.linear_norms import squared_norms
from fused_objectives.matmul import multiply
from fused_objectives.philox import philox, philox_words, stream_id
from fused_objectives.segments import checked

_BLOCK = 64
LARGEST = 128
"""Random bits of one Philox call, so the largest size of a sketch."""


@not_differentiable
def sketched_norms(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    seed: int,
    stream: str,
    size: int = 16,
    impl: str = "auto",
) -> torch.Tensor:
    """Return an unbiased estimate of each sample's squared gradient norm of a linear layer's weight, ``[S]`` float32.

    The estimate is ‖(GP)ᵀ(AQ)‖² / k², with P ``[p, k]`` and Q ``[d, k]`` of random signs, the same for all samples of a
    call: E PPᵀ = E QQᵀ = k·1. Its relative standard deviation is at most about √(4/k), for a gradient of rank 1; the
    order of a call's samples is far more certain than that, because they share P and Q. Not differentiable.

    Args:
        inputs: ``[N, d]`` floating, the layer's inputs A.
        gradients: ``[N, p]`` of the same dtype, gradients G at its outputs.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which must be finite.
        samples: S.
        seed: the run's.
        stream: names the signs; a layer and a step should have their own.
        size: k, at most 128.

    Raises:
        ValueError: for a size out of 1 .. 128, and for shapes, dtypes or segments that are not so.

    2k(d + p + k) FLOPs a token, relative to the layer's forward and backward 2k/(3d) for d = p; reads the operands once
    and writes and reads 8k bytes a token.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size: {size} is not in 1 .. {LARGEST}")
    tensors = {"inputs": (inputs, "Nd", FLOATING), "gradients": (gradients, "Np", (inputs.dtype,))}
    check(tensors | {"segments": (segments, "N", INTEGER)}, impl, samples)
    return _sketched_norms(inputs, gradients, segments, samples, seed, stream, size, impl)


@torch.library.custom_op("fused_objectives::sketched_norms", mutates_args=())
def _sketched_norms(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    seed: int,
    stream: str,
    size: int,
    impl: str,
) -> torch.Tensor:
    segments = checked(segments, samples)
    d, p = inputs.shape[1], gradients.shape[1]
    signs = _signs_triton if uses_triton(impl, inputs) else _signs_torch
    both = signs(d + p, size, seed, stream, inputs)
    short_inputs = multiply(inputs, both[:d])
    short_gradients = multiply(gradients, both[d:])
    norms = squared_norms(short_inputs, short_gradients, segments, samples, False, None, "instantiate", impl)
    return norms / size**2


@_sketched_norms.register_fake
def _(inputs, gradients, segments, samples, *_):
    return inputs.new_empty(samples, dtype=torch.float32)


def _signs_torch(rows: int, size: int, seed: int, stream: str, like: torch.Tensor) -> torch.Tensor:
    """The twin: ``[rows, size]`` of −1 and 1, bit by bit of the words of the counter (row, 0, 0, 0)."""
    words = torch.stack(philox(seed, stream, torch.arange(rows, device=like.device))[: -(-size // 32)], 1)
    bits = (words[:, :, None] >> torch.arange(32, device=like.device)) & 1
    return (2 * bits.flatten(1)[:, :size] - 1).to(like.dtype)


def _signs_triton(rows: int, size: int, seed: int, stream: str, like: torch.Tensor) -> torch.Tensor:
    signs = like.new_empty(rows, size)
    if rows:
        signs_kernel[(-(-rows // _BLOCK),)](signs, rows, size, seed & 0xFFFFFFFF, stream_id(stream), BLOCK=_BLOCK)
    return signs


@jit(do_not_specialize=["rows", "size", "seed", "stream"])
def signs_kernel(signs_ptr, rows, size, seed, stream, BLOCK: tl.constexpr):
    """One program a tile of rows, a word of their calls after another."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = philox_words(seed, stream, row, row * 0, row * 0)
    for word in tl.static_range(4):
        column = word * 32 + tl.arange(0, 32)
        bits = (words[word][:, None] >> tl.arange(0, 32).to(tl.uint32)) & 1
        signs = (2 * bits.to(tl.int32) - 1).to(tl.float32).to(signs_ptr.dtype.element_ty)
        tl.store(signs_ptr + row[:, None] * size + column, signs, mask=(row < rows)[:, None] & (column < size))


CONFIGURATIONS = [
    Configuration(
        signs_kernel,
        {"signs_ptr": f"*{element}", "rows": "i32", "size": "i32", "seed": "i64", "stream": "i64"},
        {"BLOCK": _BLOCK},
    )
    for element in ("bf16", "fp32")
]
