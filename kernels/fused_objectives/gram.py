"""Sums of products of two Gram matrices, the core of per-sample gradient norms.

The gradient of a linear layer's weight for one sample is Σ_t g_t a_tᵀ, with inputs a_t and gradients g_t at the
layer's outputs. Its squared norm is Σ_ij (a_i·a_j)(g_i·g_j) over the sample's tokens (arXiv 1510.01799): no gradient is
formed, and neither Gram matrix is written to memory.
"""

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton

_TORCH_ROWS = 256


def gram_row_sums(
    left_inputs: torch.Tensor | None,
    left_gradients: torch.Tensor,
    right_inputs: torch.Tensor | None,
    right_gradients: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    *,
    symmetric: bool = False,
    bias: bool = False,
    left_ids: torch.Tensor | None = None,
    right_ids: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return Σ_{first_i ≤ j < last_i} c_ij (a_i·a_j + bias) (g_i·g_j) 1(id_i = id_j) for every row i, ``[n]`` float32.

    Rows i are of the left side, rows j of the right. Products are added up in float32. Not differentiable.

    Args:
        left_inputs, right_inputs: ``[n, d]`` and ``[m, d]`` floating, of one dtype; None makes the factor 1.
        left_gradients, right_gradients: ``[n, p]`` and ``[m, p]`` floating, of one dtype.
        first, last: ``[n]`` int64 in 0 .. m, the rows j that count for row i: none where last ≤ first. Rows outside are
            not read, so they may hold anything.
        symmetric: left and right are the same tensors; only j ≤ i is computed, with c_ij = 2 for j < i and 1 for j = i,
            so that the sum over a sample's rows is the one over all its pairs. Otherwise c_ij = 1.
        bias: add 1 to the product of the inputs, for a layer with a bias.
        left_ids, right_ids: ``[n]`` and ``[m]`` integers, both or neither; only pairs of equal ids count.

    Raises:
        ValueError: for one side's inputs or ids without the other's, dtypes that differ, or ``bias`` without inputs.

    A row meets ``T`` others (half of them if symmetric) at 2(d + p) FLOPs each. Summed over a sample of T tokens that
    is T²(d + p), relative to the 6Tdp of the layer's forward and backward T/(2d) once for d = p, halved again by
    symmetry of the tiles off the diagonal. Memory: each operand once per tile of 64 rows, ``4n`` bytes written.
    """
    if (left_inputs is None) != (right_inputs is None) or (left_ids is None) != (right_ids is None):
        raise ValueError("inputs and ids are given for both sides or for neither")
    if bias and left_inputs is None:
        raise ValueError("bias: there are no inputs")
    for left, right in ((left_inputs, right_inputs), (left_gradients, right_gradients)):
        if left is not None and left.dtype != right.dtype:
            raise ValueError(f"the left side is {left.dtype}, the right side {right.dtype}")
    return _gram_row_sums(
        left_inputs,
        left_gradients,
        right_inputs,
        right_gradients,
        first,
        last,
        symmetric,
        bias,
        left_ids,
        right_ids,
        impl,
    )


@torch.library.custom_op("fused_objectives::gram_row_sums", mutates_args=())
def _gram_row_sums(
    left_inputs: torch.Tensor | None,
    left_gradients: torch.Tensor,
    right_inputs: torch.Tensor | None,
    right_gradients: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    symmetric: bool,
    bias: bool,
    left_ids: torch.Tensor | None,
    right_ids: torch.Tensor | None,
    impl: str,
) -> torch.Tensor:
    arguments = (left_inputs, left_gradients, right_inputs, right_gradients, first, last, symmetric, bias)
    return _gram_row_sums_torch(*arguments, left_ids, right_ids)


@_gram_row_sums.register_fake
def _(left_inputs, left_gradients, *_):
    return left_gradients.new_empty(len(left_gradients), dtype=torch.float32)


def _gram_row_sums_torch(
    left_inputs, left_gradients, right_inputs, right_gradients, first, last, symmetric, bias, left_ids, right_ids
):
    """The twin: blocks of rows against all the rows that any of them meets."""
    sums = left_gradients.new_zeros(len(left_gradients), dtype=torch.float32)
    rows = torch.arange(len(sums), device=sums.device)
    if symmetric:
        last = torch.minimum(last, rows + 1)
    for block in rows.split(_TORCH_ROWS):
        block = block[first[block] < last[block]]
        if not len(block):
            continue
        columns = torch.arange(int(first[block].min()), int(last[block].max()), device=sums.device)
        products = left_gradients[block].float() @ right_gradients[columns].float().T
        if left_inputs is not None:
            products *= left_inputs[block].float() @ right_inputs[columns].float().T + float(bias)
        counts = (first[block, None] <= columns) & (columns < last[block, None])
        if left_ids is not None:
            counts &= left_ids[block, None] == right_ids[columns]
        if symmetric:
            products *= torch.where(columns < block[:, None], 2.0, 1.0)
        sums[block] = torch.where(counts, products, 0.0).sum(1)
    return sums
