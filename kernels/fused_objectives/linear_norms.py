"""Per-sample gradient norms of linear layers, and the weight gradient along with them.

With a sample's inputs A ``[T, d]`` and gradients G ``[T, p]`` at the layer's outputs, of the sample's own loss, its
gradient is GᵀA. Two ways lead to its squared norm: Σ AAᵀ∘GGᵀ over pairs of tokens, for short samples (Gram matrices,
arXiv 1510.01799), or forming GᵀA tile by tile in registers, for long ones (arXiv 2009.03106 compares their costs).
"""

from typing import Literal

import torch

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check, check_count
from fused_objectives.gram import ALIGNMENT, aligned, gram_row_sums
from fused_objectives.segments import checked, per_token, span_sums, spans
from fused_objectives.vector_gradients import bias_gradients

METHODS = ("auto", "gram", "instantiate")
_PROGRAMS, _TORCH_ROWS = 512, 64
"""Programs that keep a GPU busy (with fewer tiles samples are dealt out to several groups); rows of a twin's tile."""


@not_differentiable
def linear_norms(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    bias: bool = False,
    longest: int | None = None,
    method: Literal["auto", "gram", "instantiate"] = "auto",
    impl: str = "auto",
) -> torch.Tensor:
    """Return each sample's squared gradient norm of a linear layer's weight, ‖GᵀA‖², ``[S]`` float32.

    Not differentiable.

    Args:
        inputs: ``[N, d]`` floating, the layer's inputs A.
        gradients: ``[N, p]`` of the same dtype, gradients G at its outputs.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which may hold anything.
        samples: S.
        bias: the layer has a bias; its squared norm ‖Σ_t g_t‖² is added.
        longest: T, tokens of the longest sample or a bound on it. None asks the segments on the CPU and takes N on a
            GPU, where asking would make the host wait.
        method: ``auto`` takes ``gram`` where T < pd/(p + d), the twin where T is less than twice that.

    Raises:
        ValueError: for another method, and for shapes, dtypes or segments that are not so.

    Gram: about T(p + d) FLOPs a token, relative to the layer's forward and backward T/(3d) to T/(2d) for d = p.
    Instantiating: 2pd a token, a third of forward and backward; ``S·p·d/4096`` bytes of scratch.
    """
    if method not in METHODS:
        raise ValueError(f"method: '{method}' is none of {', '.join(METHODS)}")
    check_count("longest", longest)
    _check(inputs, gradients, segments, samples, impl)
    return _linear_norms(inputs, gradients, segments, samples, bias, longest, method, impl)


@not_differentiable
def linear_norms_and_gradient(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each sample's squared norm ‖G_sᵀA_s‖², ``[S]`` float32, and dW = Σ_s w_s G_sᵀA_s, ``[p, d]``, at once.

    For samples so long that forming GᵀA is the cheaper way to its norm, dW costs nothing more. Not differentiable.

    Args:
        inputs, gradients, segments, samples: as of :func:`linear_norms`.
        weights: ``[S]`` floating; None weighs all by 1. A sample of weight 0 adds nothing, whatever it holds.
        dtype: of dW, which is added up in float32; None takes the inputs'.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    2Npd FLOPs, in place of the 2Npd of an ordinary weight gradient.
    """
    _check(inputs, gradients, segments, samples, impl, weights=(weights, "S", FLOATING))
    return _linear_norms_and_gradient(inputs, gradients, segments, samples, weights, dtype or inputs.dtype, impl)


def _check(inputs, gradients, segments, samples, impl, **others):
    tensors = {"inputs": (inputs, "Nd", FLOATING), "gradients": (gradients, "Np", (inputs.dtype,))}
    check(tensors | {"segments": (segments, "N", INTEGER)} | others, impl, samples)


@torch.library.custom_op("fused_objectives::linear_norms", mutates_args=())
def _linear_norms(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    bias: bool,
    longest: int | None,
    method: str,
    impl: str,
) -> torch.Tensor:
    return squared_norms(inputs, gradients, checked(segments, samples), samples, bias, longest, method, impl)


@_linear_norms.register_fake
def _(inputs, gradients, segments, samples, *_):
    return inputs.new_empty(samples, dtype=torch.float32)


def squared_norms(inputs, gradients, segments, samples, bias, longest, method, impl):
    """The op within others, which have checked their arguments."""
    triton = uses_triton(impl, inputs)
    starts, ends = spans(segments, samples, impl)
    if method == "auto":
        d, p = inputs.shape[1], gradients.shape[1]
        if longest is None:
            longest = len(inputs) if inputs.is_cuda or samples == 0 else int((ends - starts).max())
        method = "gram" if longest * (p + d) < (p * d if triton else 2 * p * d) else "instantiate"
    if method == "gram" and not triton:
        return _gram_torch(inputs, gradients, starts, ends, bias)
    if method == "gram":
        first, last = per_token(starts, segments), per_token(ends, segments)
        sums = gram_row_sums(*(inputs, gradients) * 2, first, last, symmetric=True, bias=bias, impl=impl)
        return span_sums(sums, segments, samples, impl).clamp(min=0)
    instantiate = _instantiate_triton if triton else _instantiate_torch
    norms = instantiate(inputs, gradients, starts, ends, None, gradient=False)[0]
    return norms + bias_gradients(gradients, segments, samples, impl=impl).square().sum(1) if bias else norms


@torch.library.custom_op("fused_objectives::linear_norms_and_gradient", mutates_args=())
def _linear_norms_and_gradient(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    weights: torch.Tensor | None,
    dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    instantiate = _instantiate_triton if uses_triton(impl, inputs) else _instantiate_torch
    bounds = spans(checked(segments, samples), samples, impl)
    norms, gradient = instantiate(inputs, gradients, *bounds, weights, gradient=True)
    return norms, gradient.to(dtype)


@_linear_norms_and_gradient.register_fake
def _(inputs, gradients, segments, samples, weights, dtype, impl):
    norms = inputs.new_empty(samples, dtype=torch.float32)
    return norms, inputs.new_empty(gradients.shape[1], inputs.shape[1], dtype=dtype)


def _gram_torch(inputs, gradients, starts, ends, bias):
    """The twin: a tile of a sample's rows after another, against all rows up to its last."""
    norms = inputs.new_zeros(len(starts), dtype=torch.float32)
    for sample, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        rows, slopes = inputs[start:end].float(), gradients[start:end].float()
        for first in range(0, end - start, _TORCH_ROWS):
            last = first + _TORCH_ROWS
            products = (rows[first:last] @ rows[:last].T + float(bias)) * (slopes[first:last] @ slopes[:last].T)
            norms[sample] += 2 * products.sum() - products[:, first:].sum()  # all pairs but those of the tile are two
    return norms.clamp_(min=0)


def _instantiate_torch(inputs, gradients, starts, ends, weights, gradient: bool):
    """The twin: a product for each sample. Returns norms ``[S]`` and, with ``gradient``, dW ``[p, d]`` float32."""
    norms = inputs.new_zeros(len(starts), dtype=torch.float32)
    total = inputs.new_zeros(gradients.shape[1], inputs.shape[1], dtype=torch.float32) if gradient else None
    for sample, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        product = gradients[start:end].float().T @ inputs[start:end].float()
        norms[sample] = product.square().sum()
        if gradient:
            weight = 1.0 if weights is None else float(weights[sample])
            total += weight * product if weight else 0.0
    return norms, total


def _instantiate_triton(inputs, gradients, starts, ends, weights, gradient: bool):
    samples, p, d = len(starts), gradients.shape[1], inputs.shape[1]
    if samples * p * d == 0:
        return inputs.new_zeros(samples, dtype=torch.float32), inputs.new_zeros(p, d, dtype=torch.float32)
    inputs, gradients = aligned(inputs), aligned(gradients)
    tile, rows, warps = _tiling(inputs.dtype, p, d)
    grid = (-(-p // tile), -(-d // tile))
    tiles = grid[0] * grid[1]
    groups = min(samples, -(-_PROGRAMS // tiles))
    parts = inputs.new_empty(samples, tiles, dtype=torch.float32)
    sums = parts
    if gradient:
        sums = inputs.new_empty(groups, gradients.shape[1], inputs.shape[1], dtype=torch.float32)
    instantiate_kernel[(*grid, groups)](
        inputs,
        gradients,
        starts,
        ends,
        parts if weights is None else weights.float().contiguous(),
        parts,
        sums,
        inputs.stride(0) // ALIGNMENT,
        gradients.stride(0) // ALIGNMENT,
        inputs.shape[1] // ALIGNMENT,
        gradients.shape[1] // ALIGNMENT,
        samples,
        GRADIENT=gradient,
        WEIGHTED=weights is not None,
        TILE=tile,
        ROWS=rows,
        ALIGNMENT=ALIGNMENT,
        num_warps=warps,
    )
    return parts.sum(1), sums.sum(0)[:p, :d].contiguous() if gradient else None


def _tiling(dtype: torch.dtype, p: int, d: int) -> tuple[int, int, int]:
    """Tile of dW (its side), rows of a step, warps."""
    if dtype.itemsize == 2:
        return (128, 32, 8) if min(p, d) >= 128 else (64, 64, 4)
    return 64, 16, 8


@jit(do_not_specialize=["samples"])
def instantiate_kernel(
    inputs_ptr,
    gradients_ptr,
    starts_ptr,
    ends_ptr,
    weights_ptr,
    parts_ptr,
    sums_ptr,
    inputs_stride,
    gradients_stride,
    input_width,
    gradient_width,
    samples,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program a tile of dW and group of samples, a sample after another. Strides and widths count units of
    ALIGNMENT numbers, from which the compiler learns how they are aligned."""
    inputs_stride *= ALIGNMENT
    gradients_stride *= ALIGNMENT
    input_width *= ALIGNMENT
    gradient_width *= ALIGNMENT
    group = tl.program_id(2)
    groups = tl.num_programs(2)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tiles = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    p = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    inputs_at = (row[:, None] * inputs_stride).to(tl.int32) + d  # within a step, so 32 bits suffice
    gradients_at = (row[:, None] * gradients_stride).to(tl.int32) + p
    total = tl.zeros([TILE, TILE], tl.float32)
    for sample in range(group, samples, groups):
        start, end = tl.load(starts_ptr + sample), tl.load(ends_ptr + sample)
        product = tl.zeros([TILE, TILE], tl.float32)
        for first in range(start, end, ROWS):
            left = (first + row < end)[:, None]
            fits = left & (d < input_width)
            inputs = tl.load(inputs_ptr + first * inputs_stride + inputs_at, mask=fits, other=0.0)
            fits = left & (p < gradient_width)
            gradients = tl.load(gradients_ptr + first * gradients_stride + gradients_at, mask=fits, other=0.0)
            product = tl.dot(tl.trans(gradients), inputs, product, input_precision="ieee")
        tl.store(parts_ptr + sample * tiles + tile, tl.sum(product * product))
        if GRADIENT:
            if WEIGHTED:
                weight = tl.load(weights_ptr + sample)
                product = tl.where(weight == 0, 0.0, product * weight)
            total += product
    if GRADIENT:
        at = (group.to(tl.int64) * gradient_width + p[:, None]) * input_width + d
        tl.store(sums_ptr + at, total, mask=(p < gradient_width)[:, None] & (d < input_width))


CONFIGURATIONS = [
    Configuration(
        instantiate_kernel,
        {"inputs_ptr": f"*{element}", "gradients_ptr": f"*{element}", "starts_ptr": "*i64", "ends_ptr": "*i64"}
        | {"weights_ptr": "*fp32", "parts_ptr": "*fp32", "sums_ptr": "*fp32"}
        | {"inputs_stride": "i64", "gradients_stride": "i64", "input_width": "i32", "gradient_width": "i32"}
        | {"samples": "i32"},
        {"GRADIENT": gradient, "WEIGHTED": weighted, "TILE": tile, "ROWS": rows, "ALIGNMENT": ALIGNMENT},
        num_warps=warps,
    )
    for element, (tile, rows, warps) in (
        ("bf16", _tiling(torch.bfloat16, 128, 128)),
        ("bf16", _tiling(torch.bfloat16, 64, 64)),
        ("fp32", _tiling(torch.float32, 64, 64)),
    )
    for gradient, weighted in ((False, False), (True, False), (True, True))
]
