"""Per-sample gradients of parameters that are vectors: biases, and the scales and shifts of normalisations.

They are as small as a row of the activations, so unlike a matrix's they are formed: norms and weighted sums of them
then cost next to nothing.
"""

import torch
import torch.nn.functional as F

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.segments import checked, row_sums, spans

_SUMS = {"ROWS": 32, "COLUMNS": 64}
_STATISTICS = {"ROWS": 8, "COLUMNS": 256}


@not_differentiable
def bias_gradients(
    gradients: torch.Tensor, segments: torch.Tensor, samples: int, *, impl: str = "auto"
) -> torch.Tensor:
    """Return each sample's gradient of a bias, Σ_t g_t, ``[S, p]`` float32. Not differentiable.

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
    return _bias_gradients(gradients, segments, samples, impl)


@not_differentiable
def layer_norm_gradients(
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
    """Return each sample's gradients of a LayerNorm's or RMSNorm's parameters, ``[k, S, p]`` float32: Σ_t g_t ∘ x̂_t for
    the scale and, with k = 2, Σ_t g_t for the shift. Not differentiable.

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
    return _layer_norm_gradients(gradients, inputs, segments, samples, eps, rms, shift, impl)


@torch.library.custom_op("fused_objectives::bias_gradients", mutates_args=())
def _bias_gradients(gradients: torch.Tensor, segments: torch.Tensor, samples: int, impl: str) -> torch.Tensor:
    segments = checked(segments, samples)
    if uses_triton(impl, gradients):
        return _sums_triton(gradients, None, None, segments, samples, True)[0]
    return row_sums(gradients, segments, samples)


@_bias_gradients.register_fake
def _(gradients, segments, samples, impl):
    return gradients.new_empty(samples, gradients.shape[1], dtype=torch.float32)


@torch.library.custom_op("fused_objectives::layer_norm_gradients", mutates_args=())
def _layer_norm_gradients(
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
        return _sums_triton(gradients, inputs, _statistics_triton(inputs, eps, rms), segments, samples, shift)
    normalise = F.rms_norm if rms else F.layer_norm
    normalised = normalise(inputs.float(), gradients.shape[1:], eps=eps).mul_(gradients)
    return torch.stack([row_sums(each, segments, samples) for each in (normalised, gradients)[: 1 + shift]])


@_layer_norm_gradients.register_fake
def _(gradients, inputs, segments, samples, eps, rms, shift, impl):
    return gradients.new_empty(1 + shift, samples, gradients.shape[1], dtype=torch.float32)


def _statistics_triton(inputs: torch.Tensor, eps: float, rms: bool) -> torch.Tensor:
    """Mean (0 if ``rms``) and reciprocal deviation of each row, ``[2, N]`` float32."""
    rows, width = inputs.shape
    statistics = inputs.new_empty(2, rows, dtype=torch.float32)
    if rows:
        grid = (-(-rows // _STATISTICS["ROWS"]),)
        statistics_kernel[grid](inputs, statistics, *inputs.stride(), rows, width, eps, RMS=rms, **_STATISTICS)
    return statistics


def _sums_triton(gradients, inputs, statistics, segments, samples, shift):
    rows, width = gradients.shape
    scale = inputs is not None
    sums = gradients.new_empty(scale + shift, samples, width, dtype=torch.float32)
    if sums.numel():
        inputs, statistics = (inputs, statistics) if scale else (gradients, sums)  # or not read
        vector_sums_kernel[(samples, -(-width // _SUMS["COLUMNS"]))](
            gradients,
            inputs,
            statistics,
            *spans(segments, samples, "triton"),
            sums,
            *gradients.stride(),
            *inputs.stride(),
            rows,
            width,
            SCALE=scale,
            SHIFT=shift,
            **_SUMS,
        )
    return sums


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
def vector_sums_kernel(
    gradients_ptr,
    inputs_ptr,
    statistics_ptr,
    starts_ptr,
    ends_ptr,
    sums_ptr,
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
    """One program a sample and tile of columns: the scale's sums over the sample's rows, then the shift's."""
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
    sums_ptr += sample * width + column
    if SCALE:
        tl.store(sums_ptr, tl.sum(scale, 0), mask=column < width)
        sums_ptr += tl.num_programs(0).to(tl.int64) * width
    if SHIFT:
        tl.store(sums_ptr, tl.sum(shift, 0), mask=column < width)


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
        vector_sums_kernel,
        {"gradients_ptr": f"*{element}", "inputs_ptr": f"*{element}", "statistics_ptr": "*fp32"}
        | {"starts_ptr": "*i64", "ends_ptr": "*i64", "sums_ptr": "*fp32"}
        | {f"{what}_{kind}_stride": "i64" for what in ("gradients", "inputs") for kind in ("row", "column")}
        | {"rows": "i64", "width": "i32"},
        {"SCALE": scale, "SHIFT": shift, **_SUMS},
    )
    for element in ("bf16", "fp32")
    for scale, shift in ((False, True), (True, True), (True, False))
]
