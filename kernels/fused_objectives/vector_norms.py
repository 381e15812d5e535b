"""Per-sample gradient norms of parameters that are vectors: biases, and the scales and shifts of normalisations."""

import torch
import torch.nn.functional as F

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.segments import checked, runs, spans

_SUMS = {"ROWS": 32, "COLUMNS": 64}
_STATISTICS = {"ROWS": 8, "COLUMNS": 256}


@not_differentiable
def bias_norms(gradients: torch.Tensor, segments: torch.Tensor, samples: int, *, impl: str = "auto") -> torch.Tensor:
    """Return each sample's squared gradient norm of a bias, ‖Σ_t g_t‖², ``[S]`` float32. Not differentiable.

    Args:
        gradients: ``[N, p]`` floating, gradients at the layer's outputs.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which may hold anything.
        samples: S.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    Np FLOPs; reads the gradients once.
    """
    check({"gradients": (gradients, "Np", FLOATING), "segments": (segments, "N", INTEGER)}, impl, samples)
    return _bias_norms(gradients, segments, samples, impl)


@not_differentiable
def layer_norm_norms(
    gradients: torch.Tensor,
    inputs: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    eps: float,
    rms: bool = False,
    shift: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """Return each sample's squared gradient norm of a LayerNorm's or RMSNorm's parameters, ``[S]`` float32:
    ‖Σ_t g_t ∘ x̂_t‖² for the scale, and ‖Σ_t g_t‖² for the shift. Not differentiable.

    Args:
        gradients: ``[N, p]`` floating, gradients at the outputs.
        inputs: ``[N, p]`` floating, as they came: x̂ = (x − mean) / √(variance + eps) is computed anew in float32.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which may hold anything.
        samples: S.
        eps: as in the layer.
        rms: x̂ = x / √(mean of squares + eps), as in RMSNorm (arXiv 1910.07467).
        shift: the layer has one.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    About 10Np FLOPs; reads the gradients once and the inputs twice.
    """
    tensors = {"gradients": (gradients, "Np", FLOATING), "inputs": (inputs, "Np", FLOATING)}
    check(tensors | {"segments": (segments, "N", INTEGER)}, impl, samples)
    return _layer_norm_norms(gradients, inputs, segments, samples, eps, rms, shift, impl)


@torch.library.custom_op("fused_objectives::bias_norms", mutates_args=())
def _bias_norms(gradients: torch.Tensor, segments: torch.Tensor, samples: int, impl: str) -> torch.Tensor:
    return squared_sums(gradients, checked(segments, samples), samples, impl)


@_bias_norms.register_fake
def _(gradients, segments, samples, impl):
    return gradients.new_empty(samples, dtype=torch.float32)


def squared_sums(gradients: torch.Tensor, segments: torch.Tensor, samples: int, impl: str) -> torch.Tensor:
    """The op within others, which have checked their arguments."""
    if uses_triton(impl, gradients):
        return _norms_triton(gradients, None, None, segments, samples, True)
    sums = gradients.new_zeros(samples, gradients.shape[1], dtype=torch.float32)
    for sample, rows in runs(segments, gradients):
        torch.sum(rows, 0, dtype=torch.float32, out=sums[sample])
    return sums.square().sum(1)


@torch.library.custom_op("fused_objectives::layer_norm_norms", mutates_args=())
def _layer_norm_norms(
    gradients: torch.Tensor,
    inputs: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    eps: float,
    rms: bool,
    shift: bool,
    impl: str,
) -> torch.Tensor:
    segments = checked(segments, samples)
    if uses_triton(impl, gradients):
        return _norms_triton(gradients, inputs, _statistics_triton(inputs, eps, rms), segments, samples, shift)
    normalise = F.rms_norm if rms else F.layer_norm
    width = gradients.shape[1:]
    sums = gradients.new_zeros(2, samples, *width, dtype=torch.float32)  # of the scale and of the shift
    for sample, rows, into in runs(segments, gradients, inputs):
        rows, normalised = rows.float(), normalise(into.float(), width, eps=eps)
        torch.sum(rows * normalised, 0, out=sums[0, sample])
        if shift:
            torch.sum(rows, 0, out=sums[1, sample])
    return sums.square().sum((0, 2))


@_layer_norm_norms.register_fake
def _(gradients, inputs, segments, samples, eps, rms, shift, impl):
    return gradients.new_empty(samples, dtype=torch.float32)


def _statistics_triton(inputs: torch.Tensor, eps: float, rms: bool) -> torch.Tensor:
    """Mean (0 if ``rms``) and reciprocal deviation of each row, ``[2, N]`` float32."""
    rows, width = inputs.shape
    statistics = inputs.new_empty(2, rows, dtype=torch.float32)
    if rows:
        grid = (-(-rows // _STATISTICS["ROWS"]),)
        statistics_kernel[grid](inputs, statistics, *inputs.stride(), rows, width, eps, RMS=rms, **_STATISTICS)
    return statistics


def _norms_triton(gradients, inputs, statistics, segments, samples, shift):
    rows, width = gradients.shape
    tiles = -(-width // _SUMS["COLUMNS"])
    if not samples * tiles:
        return gradients.new_zeros(samples, dtype=torch.float32)
    parts = gradients.new_empty(samples, tiles, dtype=torch.float32)
    starts, ends = spans(segments, samples, "triton")
    scale = inputs is not None
    inputs, statistics = (inputs, statistics) if scale else (gradients, parts)  # or not read
    vector_norms_kernel[(samples, tiles)](
        gradients,
        inputs,
        statistics,
        starts,
        ends,
        parts,
        *gradients.stride(),
        *inputs.stride(),
        rows,
        width,
        SCALE=scale,
        SHIFT=shift,
        **_SUMS,
    )
    return parts.sum(1)


@jit(do_not_specialize=["rows"])
def statistics_kernel(
    inputs_ptr,
    statistics_ptr,
    row_stride,
    column_stride,
    rows,
    width,
    eps,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a tile of rows: their means, then their deviations from those, for which rows come from the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    inputs_ptr += (row * row_stride)[:, None]
    totals = tl.zeros([ROWS, COLUMNS], tl.float32)
    if not RMS:
        for start in range(0, width, COLUMNS):
            column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
            fits = inside[:, None] & (column < width)
            totals += tl.load(inputs_ptr + column * column_stride, mask=fits, other=0.0).to(tl.float32)
    mean = tl.sum(totals, 1) / width
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        fits = inside[:, None] & (column < width)
        centred = tl.load(inputs_ptr + column * column_stride, mask=fits, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.where(fits, centred * centred, 0.0)
    tl.store(statistics_ptr + row, mean, mask=inside)
    tl.store(statistics_ptr + rows + row, 1 / tl.sqrt(tl.sum(squares, 1) / width + eps), mask=inside)


@jit(do_not_specialize=["rows"])
def vector_norms_kernel(
    gradients_ptr,
    inputs_ptr,
    statistics_ptr,
    starts_ptr,
    ends_ptr,
    parts_ptr,
    gradients_row_stride,
    gradients_column_stride,
    inputs_row_stride,
    inputs_column_stride,
    rows,
    width,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a sample and tile of columns: sums over the sample's rows, then the sum of their squares."""
    sample, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, end = tl.load(starts_ptr + sample), tl.load(ends_ptr + sample)
    column = (tile * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)  # for strides of as many rows as there may be
    gradients_ptr += column * gradients_column_stride
    inputs_ptr += column * inputs_column_stride
    scale = tl.zeros([ROWS, COLUMNS], tl.float32)
    shift = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        fits = (row < end)[:, None] & (column < width)
        at = row[:, None] * gradients_row_stride
        gradients = tl.load(gradients_ptr + at, mask=fits, other=0.0).to(tl.float32)
        shift += gradients
        if SCALE:
            at = row[:, None] * inputs_row_stride
            inputs = tl.load(inputs_ptr + at, mask=fits, other=0.0).to(tl.float32)
            mean = tl.load(statistics_ptr + row, mask=row < end, other=0.0)
            reciprocal = tl.load(statistics_ptr + rows + row, mask=row < end, other=0.0)
            scale += gradients * (inputs - mean[:, None]) * reciprocal[:, None]
    norm = 0.0
    if SCALE:
        sums = tl.sum(scale, 0)
        norm += tl.sum(sums * sums)
    if SHIFT:
        sums = tl.sum(shift, 0)
        norm += tl.sum(sums * sums)
    tl.store(parts_ptr + sample * tl.num_programs(1) + tile, norm)


CONFIGURATIONS = [
    Configuration(
        statistics_kernel,
        {"inputs_ptr": f"*{element}", "statistics_ptr": "*fp32", "row_stride": "i64", "column_stride": "i64"}
        | {"rows": "i64", "width": "i32", "eps": "fp32"},
        {"RMS": rms, **_STATISTICS},
    )
    for element in ("bf16", "fp32")
    for rms in (False, True)
] + [
    Configuration(
        vector_norms_kernel,
        {"gradients_ptr": f"*{element}", "inputs_ptr": f"*{element}", "statistics_ptr": "*fp32"}
        | {"starts_ptr": "*i64", "ends_ptr": "*i64", "parts_ptr": "*fp32"}
        | {f"{what}_{kind}_stride": "i64" for what in ("gradients", "inputs") for kind in ("row", "column")}
        | {"rows": "i64", "width": "i32"},
        {"SCALE": scale, "SHIFT": shift, **_SUMS},
    )
    for element in ("bf16", "fp32")
    for scale, shift in ((False, True), (True, True), (True, False))
]
