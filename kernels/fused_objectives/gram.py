"""Sums of products of two Gram matrices, the core of per-sample gradient norms.

The gradient of a linear layer's weight for one sample is Σ_t g_t a_tᵀ, with inputs a_t and gradients g_t at the
layer's outputs. Its squared norm is Σ_ij (a_i·a_j)(g_i·g_j) over the sample's tokens (arXiv 1510.01799): no gradient is
formed, and neither Gram matrix is written to memory.
"""

import torch

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton

_BLOCK, _WARPS, ALIGNMENT = 64, 8, 16
_TORCH_ROWS = 128


@not_differentiable
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
        first, last: ``[n]`` int64 in 0 .. m, the rows j that count for row i: none where last ≤ first. Rows that
            count for none may hold anything, NaN too.
        symmetric: left and right are the same tensors; only j ≤ i is computed, with c_ij = 2 for j < i and 1 for j = i,
            so that the sum over a sample's rows is the one over all its pairs. Otherwise c_ij = 1.
        bias: add 1 to the product of the inputs, for a layer with a bias.
        left_ids, right_ids: ``[n]`` and ``[m]`` integers, both or neither; only pairs of equal ids count.

    Raises:
        ValueError: for one side's inputs or ids without the other's, dtypes that differ, or ``bias`` without inputs.

    A pair costs 2(d + p) FLOPs, a sample of T tokens 2T²(d + p), if symmetric half of that and the diagonal's tiles.
    Relative to the 6Tdp of the layer's forward and backward that is, for d = p, 2T/(3d), if symmetric T/(3d) for long
    samples and T/(2d) for 128 tokens. Memory: each tile of rows reads its own and the rows it meets, in all
    2(d + p)(1 + T/64) bytes a row of 16-bit numbers, mostly from the L2 cache, and writes 4 bytes a row.
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
    launch = _gram_row_sums_triton if uses_triton(impl, left_gradients) else _gram_row_sums_torch
    operands = (left_inputs, left_gradients, right_inputs, right_gradients)
    return launch(*operands, first, last, symmetric, bias, left_ids, right_ids)


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
    for start in range(0, len(sums), _TORCH_ROWS):
        block = slice(start, start + _TORCH_ROWS)
        begins, ends = first[block, None], last[block, None]
        counted = begins < ends
        if not counted.any():
            continue
        meets = slice(int(begins[counted].min()), int(ends[counted].max()))
        columns = torch.arange(meets.start, meets.stop, device=sums.device)
        products = left_gradients[block].float() @ right_gradients[meets].float().T
        if left_inputs is not None:
            products *= (left_inputs[block].float() @ right_inputs[meets].float().T).add_(float(bias))
        counts = (begins <= columns) & (columns < ends)
        if left_ids is not None:
            counts &= left_ids[block, None] == right_ids[meets]
        if symmetric:
            products *= torch.where(columns < rows[block, None], 2.0, 1.0)
        sums[block] = torch.where(counts, products, 0.0).sum(1)
    return sums


def _gram_row_sums_triton(
    left_inputs, left_gradients, right_inputs, right_gradients, first, last, symmetric, bias, left_ids, right_ids
):
    sums = left_gradients.new_empty(len(left_gradients), dtype=torch.float32)
    if len(sums) == 0:
        return sums
    has_inputs, has_ids = left_inputs is not None, left_ids is not None
    gradients = [aligned(left_gradients), aligned(right_gradients)]
    inputs = [aligned(left_inputs), aligned(right_inputs)] if has_inputs else gradients  # or not read
    ids = [left_ids.contiguous(), right_ids.contiguous()] if has_ids else [first, first]
    gram_kernel[(-(-len(sums) // _BLOCK),)](
        *inputs,
        *gradients,
        first.contiguous(),
        last.contiguous(),
        *ids,
        sums,
        *(operand.stride(0) // ALIGNMENT for operand in (*inputs, *gradients)),
        len(sums),
        inputs[0].shape[1] // ALIGNMENT,
        gradients[0].shape[1] // ALIGNMENT,
        HAS_INPUTS=has_inputs,
        HAS_IDS=has_ids,
        SYMMETRIC=symmetric,
        BIAS=bias,
        BLOCK=_BLOCK,
        INNER=inner_columns(left_gradients.dtype),
        ALIGNMENT=ALIGNMENT,
        num_warps=_WARPS,
    )
    return sums


def aligned(operand: torch.Tensor) -> torch.Tensor:
    """Return ``operand [n, width]`` with width and row stride multiples of 16, so that a thread can load 16 bytes and
    more at once: itself, or a copy with columns of zeros, which add nothing to a product."""
    width = operand.shape[1]
    if width % ALIGNMENT == 0 and operand.stride(0) % ALIGNMENT == 0 and operand.stride(1) == 1:
        return operand
    copy = operand.new_zeros(len(operand), width + -width % ALIGNMENT)
    copy[:, :width] = operand
    return copy


def inner_columns(dtype: torch.dtype) -> int:
    """How many columns of inputs or gradients a step takes: fewer in float32, which needs more registers."""
    return 64 if dtype.itemsize == 2 else 16


@jit
def _products(
    left_ptr, left_stride, left_ok, right_ptr, right_stride, right_ok, width, BLOCK: tl.constexpr, INNER: tl.constexpr
):
    """Products of each row of a block with each of another, ``[BLOCK, BLOCK]`` float32; 0 where a row is not ok."""
    row = tl.arange(0, BLOCK)[:, None]
    inner = tl.arange(0, INNER)
    left_at = (row * left_stride).to(tl.int32) + inner  # within a block, so 32 bits suffice and spare registers
    right_at = (row * right_stride).to(tl.int32) + inner
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, width, INNER):
        fits = start + inner < width
        left = tl.load(left_ptr + start + left_at, mask=left_ok[:, None] & fits, other=0.0)
        right = tl.load(right_ptr + start + right_at, mask=right_ok[:, None] & fits, other=0.0)
        products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
    return products


@jit(do_not_specialize=["rows"])
def gram_kernel(
    left_inputs_ptr,
    right_inputs_ptr,
    left_gradients_ptr,
    right_gradients_ptr,
    first_ptr,
    last_ptr,
    left_ids_ptr,
    right_ids_ptr,
    sums_ptr,
    left_inputs_stride,
    right_inputs_stride,
    left_gradients_stride,
    right_gradients_stride,
    rows,
    input_width,
    gradient_width,
    HAS_INPUTS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program a tile of rows, against tiles of all the rows that any of its rows meets. Strides and widths count
    units of ALIGNMENT numbers, from which the compiler learns how they are aligned."""
    left_inputs_stride *= ALIGNMENT
    right_inputs_stride *= ALIGNMENT
    left_gradients_stride *= ALIGNMENT
    right_gradients_stride *= ALIGNMENT
    input_width *= ALIGNMENT
    gradient_width *= ALIGNMENT
    top = tl.program_id(0).to(tl.int64) * BLOCK
    i = top + tl.arange(0, BLOCK)
    inside = i < rows
    first = tl.load(first_ptr + i, mask=inside, other=0).to(tl.int64)
    last = tl.load(last_ptr + i, mask=inside, other=0).to(tl.int64)
    if SYMMETRIC:
        last = tl.minimum(last, i + 1)
    counted = first < last
    lowest = tl.min(tl.where(counted, first, 0x7FFFFFFFFFFFFFFF))
    highest = tl.max(tl.where(counted, last, 0))
    if HAS_IDS:
        left_ids = tl.load(left_ids_ptr + i, mask=inside, other=0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(lowest, highest, BLOCK):
        j = start + tl.arange(0, BLOCK)
        exists = j < highest
        products = _products(
            left_gradients_ptr + top * left_gradients_stride,
            left_gradients_stride,
            counted,
            right_gradients_ptr + start * right_gradients_stride,
            right_gradients_stride,
            exists,
            gradient_width,
            BLOCK,
            INNER,
        )
        if HAS_INPUTS:
            inputs = _products(
                left_inputs_ptr + top * left_inputs_stride,
                left_inputs_stride,
                counted,
                right_inputs_ptr + start * right_inputs_stride,
                right_inputs_stride,
                exists,
                input_width,
                BLOCK,
                INNER,
            )
            products *= inputs + 1.0 if BIAS else inputs
        counts = (first[:, None] <= j) & (j < last[:, None])
        if HAS_IDS:
            right_ids = tl.load(right_ids_ptr + j, mask=exists, other=0)
            counts &= left_ids[:, None] == right_ids
        if SYMMETRIC:
            products *= tl.where(j < i[:, None], 2.0, 1.0)
        sums += tl.sum(tl.where(counts, products, 0.0), 1)
    tl.store(sums_ptr + i, sums, mask=inside)


CONFIGURATIONS = [
    Configuration(
        gram_kernel,
        {f"{side}_{what}_ptr": f"*{element}" for what in ("inputs", "gradients") for side in ("left", "right")}
        | {f"{name}_ptr": "*i64" for name in ("first", "last", "left_ids", "right_ids")}
        | {"sums_ptr": "*fp32"}
        | {f"{side}_{what}_stride": "i64" for what in ("inputs", "gradients") for side in ("left", "right")}
        | {"rows": "i64", "input_width": "i32", "gradient_width": "i32"},
        {
            "HAS_INPUTS": has_inputs,
            "HAS_IDS": not has_inputs,
            "SYMMETRIC": symmetric,
            "BIAS": bias,
            "BLOCK": _BLOCK,
            "INNER": inner_columns(dtype),
            "ALIGNMENT": ALIGNMENT,
        },
        num_warps=_WARPS,
    )
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for has_inputs, symmetric, bias in (
        (True, True, False),
        (True, True, True),
        (True, False, False),
        (True, False, True),
        (False, True, False),
    )
]
