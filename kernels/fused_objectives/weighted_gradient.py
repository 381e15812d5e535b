"""A linear layer's weight gradient with a weight for each sample, formed after the weights are known."""

import torch

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.matmul import multiply
from fused_objectives.segments import checked, per_token

_BLOCK = 1024


@not_differentiable
def weighted_gradient(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    weights: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return dW = Σ_n w_seg(n) g_n a_nᵀ, ``[p, d]``, added up in float32.

    The narrower operand is scaled row by row, in its own dtype as a backward with weighted losses would have it; then
    cuBLAS multiplies. Not differentiable.

    Args:
        inputs: ``[N, d]`` floating, the layer's inputs.
        gradients: ``[N, p]`` of the same dtype, gradients of the samples' unweighted losses at the layer's outputs.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding.
        weights: ``[S]`` floating. A row of weight 0 and padding are scaled to 0 whatever the operand holds there; the
            other operand must be finite.
        dtype: of dW; None takes the inputs'.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    2Npd FLOPs; the scaling reads and writes the narrower operand once.
    """
    tensors = {"inputs": (inputs, "Nd", FLOATING), "gradients": (gradients, "Np", (inputs.dtype,))}
    check(tensors | {"segments": (segments, "N", INTEGER), "weights": (weights, "S", FLOATING)}, impl)
    return _weighted_gradient(inputs, gradients, segments, weights, dtype or inputs.dtype, impl)


@torch.library.custom_op("fused_objectives::weighted_gradient", mutates_args=())
def _weighted_gradient(
    inputs: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
    impl: str,
) -> torch.Tensor:
    row_weights = per_token(weights.float(), checked(segments, len(weights)))
    scale = _scale_rows_triton if uses_triton(impl, inputs) else _scale_rows_torch
    if inputs.shape[1] < gradients.shape[1]:
        inputs = scale(inputs, row_weights)
    else:
        gradients = scale(gradients, row_weights)
    return multiply(gradients.T, inputs).to(dtype)


@_weighted_gradient.register_fake
def _(inputs, gradients, segments, weights, dtype, impl):
    return inputs.new_empty(gradients.shape[1], inputs.shape[1], dtype=dtype)


def _scale_rows_torch(matrix: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    scaled = (matrix * row_weights[:, None]).to(matrix.dtype)
    return scaled.index_fill_(0, (row_weights == 0).nonzero()[:, 0], 0)


def _scale_rows_triton(matrix: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    scaled = matrix.new_empty(matrix.shape)
    rows, width = matrix.shape
    if scaled.numel():
        grid = (rows, -(-width // _BLOCK))
        scale_rows_kernel[grid](matrix, row_weights, scaled, *matrix.stride(), width, BLOCK=_BLOCK)
    return scaled


@jit
def scale_rows_kernel(matrix_ptr, weights_ptr, scaled_ptr, row_stride, column_stride, width, BLOCK: tl.constexpr):
    """One program a row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + row)
    values = tl.load(matrix_ptr + row * row_stride + column * column_stride, mask=column < width, other=0.0)
    scaled = tl.where(weight == 0, 0.0, values.to(tl.float32) * weight)
    tl.store(scaled_ptr + row * width + column, scaled.to(scaled_ptr.dtype.element_ty), mask=column < width)


CONFIGURATIONS = [
    Configuration(
        scale_rows_kernel,
        {"matrix_ptr": f"*{element}", "weights_ptr": "*fp32", "scaled_ptr": f"*{element}"}
        | {"row_stride": "i64", "column_stride": "i64", "width": "i32"},
        {"BLOCK": _BLOCK},
    )
    for element in ("bf16", "fp32")
]
