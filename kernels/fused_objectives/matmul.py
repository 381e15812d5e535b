"""Matrix products that are added up and returned in float32, whatever the dtype of their operands, and weighted sums of
a matrix's rows.

cuBLAS does so for 16-bit operands (``out_dtype``, CUDA only; torch 2.8 and later, to add to float32 sums 2.10 and
later). Elsewhere they are converted.
"""

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton

_ROWS, _COLUMNS, _WARPS = 32, 128, 4
_HALVES = (torch.bfloat16, torch.float16)
_CUBLAS_WRITES_FP32 = hasattr(torch.ops.aten.addmm, "dtype_out")


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left [n, k]`` @ ``right [k, m]`` of one floating dtype as ``[n, m]`` float32."""
    if _by_cublas(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def accumulate(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left [n, k]`` @ ``right [k, m]`` of one floating dtype to ``sums [n, m]`` float32, in place."""
    if _by_cublas(left):
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.float(), right.float())


def _by_cublas(operand: torch.Tensor) -> bool:
    return _CUBLAS_WRITES_FP32 and operand.is_cuda and operand.dtype in _HALVES


def accumulate_rows(sums: torch.Tensor, matrix: torch.Tensor, weights: torch.Tensor, impl: str = "auto") -> None:
    """Add ``weights [n]`` @ ``matrix [n, m]`` to ``sums [m]``, in place and in float32.

    Args:
        sums, weights: contiguous float32.
        matrix: floating, with contiguous rows.

    The kernel reads the matrix once, and adds the rows up in one order.
    """
    rows, columns = matrix.shape
    if not uses_triton(impl, matrix):
        sums.addmv_(matrix.float().t(), weights)
    elif rows and columns:
        row_sum_kernel[(-(-columns // _COLUMNS),)](
            sums,
            matrix,
            weights,
            matrix.stride(0),
            rows,
            columns,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )


@jit(do_not_specialize=["rows"])
def row_sum_kernel(
    sums_ptr, matrix_ptr, weights_ptr, row_stride, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program a group of columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        values = tl.load(matrix_ptr + row.to(tl.int64)[:, None] * row_stride + column, mask=inside, other=0.0)
        weights = tl.load(weights_ptr + row, mask=row < rows, other=0.0)
        total += tl.sum(weights[:, None] * values.to(tl.float32), 0)
    total += tl.load(sums_ptr + column, mask=column < columns, other=0.0)
    tl.store(sums_ptr + column, total, mask=column < columns)


CONFIGURATIONS = [
    Configuration(
        row_sum_kernel,
        {
            "sums_ptr": "*fp32",
            "matrix_ptr": f"*{dtype}",
            "weights_ptr": "*fp32",
            "row_stride": "i32",
            "rows": "i32",
            "columns": "i32",
        },
        {"ROWS": _ROWS, "COLUMNS": _COLUMNS},
        _WARPS,
    )
    for dtype in ("bf16", "fp32")
]
