"""The loss of a discriminator that says of every token whether it was tampered with: replaced, swapped, inserted …"""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_objectives.backend import Configuration, jit, tl, uses_triton, without_autocast
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.segments import checked, owners, span_sums, spans
from fused_objectives.segments import per_token as spread
from fused_objectives.targets import IGNORED

WIDEST = 2048
"""Largest d of the kernels: a program holds whole rows, padded to a power of two, so that each is read once."""
_ROWS = 4  # that a program holds at once
_WARP = 256  # columns of theirs that one of its warps holds
_BLOCK = 1024  # tokens of a sample that are added up at once
_PARTS = (
    16  # columns of the parts that a program adds up; the first are the total, the bias, and room to align the others
)


class Detection(NamedTuple):
    """Binary cross-entropies of N tokens; only ``total`` is differentiable."""

    total: torch.Tensor
    """``[]`` float32: sum over tokens of sample weight · token weight · loss."""
    sums: torch.Tensor
    """``[S]`` float32: each sample's sum of token weight · loss."""
    counts: torch.Tensor
    """``[S]`` int64: each sample's number of labels that count."""
    per_token: torch.Tensor
    """``[N]`` float32: unweighted losses, 0 where ignored."""
    logits: torch.Tensor
    """``[N]`` float32, 0 where ignored; positive where the head says 1."""


def detection_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    bias: torch.Tensor | None = None,
    sample_weights: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    impl: str = "auto",
) -> Detection:
    """Binary cross-entropy of a linear head on every token (ELECTRA, arXiv 2003.10555).

    loss = max(z, 0) − z·label + log(1 + exp(−\\|z\\|)), z = hidden · weight + bias. Tokens with label
    :data:`~fused_objectives.targets.IGNORED` or in no sample have no loss, and gradients of zero. ``total`` is
    differentiable with respect to ``hidden``, ``weight`` and ``bias``, once.

    All arithmetic is in float32. The forward pass reads ``hidden`` once, for the losses and the gradients of ``weight``
    and ``bias`` alike; the backward pass writes the gradient of ``hidden``. So 2·N·d elements move and 6·N·d operations
    are made; without gradients N·d and 2·N·d.

    Args:
        hidden: ``[N, d]`` floating.
        weight: ``[d]`` floating.
        labels: ``[N]`` integers, 0, 1 or IGNORED. Another one makes the token's loss and gradients NaN.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding.
        samples: S.
        bias: ``[1]`` floating.
        sample_weights: ``[S]`` floating, 1 if None.
        token_weights: ``[N]`` floating, 1 if None.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so, or if the kernel is to run and d is above
            :data:`WIDEST`.
    """
    tensors = {
        "hidden": (hidden, "Nd", FLOATING),
        "weight": (weight, "d", FLOATING),
        "bias": (bias, "1", FLOATING),
        "labels": (labels, "N", INTEGER),
        "segments": (segments, "N", INTEGER),
        "sample_weights": (sample_weights, "S", FLOATING),
        "token_weights": (token_weights, "N", FLOATING),
    }
    check(tensors, impl, samples)
    gradients = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    weights = sample_weights, token_weights
    with without_autocast(hidden):  # it would reach into the op
        results = _detection(hidden, weight, bias, labels, segments, samples, *weights, gradients, impl)
    return Detection(*results[: len(Detection._fields)])


@torch.library.custom_op("fused_objectives::detection", mutates_args=())
def _detection(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    sample_weights: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    gradients: bool,
    impl: str,
) -> tuple[(torch.Tensor,) * 8]:
    """Return the fields of :class:`Detection` and, with ``gradients`` (else empty), the gradients of ``total`` with
    respect to the logits, ``[N]``, the weight, ``[d]``, and the bias, ``[1]``, all float32."""
    run = _detect if uses_triton(impl, hidden) and hidden.numel() and samples else _detect_torch
    labels, segments = labels.long(), checked(segments, samples)
    return run(hidden, weight, bias, labels, segments, samples, sample_weights, token_weights, gradients)


@_detection.register_fake
def _(hidden, weight, bias, labels, segments, samples, sample_weights, token_weights, gradients, impl):
    def floats(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    tokens, width = hidden.shape
    counts = labels.new_empty(samples, dtype=torch.int64)
    slopes = (tokens, width, 1) if gradients else (0, 0, 0)
    return floats(), floats(samples), counts, floats(tokens), floats(tokens), *map(floats, slopes)


@register_flop_formula(torch.ops.fused_objectives.detection)
def _flops(hidden, weight, bias, labels, segments, samples, sample_weights, token_weights, gradients, *_, **__):
    """A product for the logits, and with gradients one for the weight's; hidden's is the backward pass's."""
    return 2 * hidden[0] * hidden[1] * (2 if gradients else 1)


def _remember(ctx, inputs, output):
    hidden, weight, bias = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, *output[len(Detection._fields) :])
    ctx.hidden_dtype, ctx.bias_dtype, ctx.impl = hidden.dtype, None if bias is None else bias.dtype, inputs[-1]


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 10
    weight, slopes, weight_gradient, bias_gradient = ctx.saved_tensors
    for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
    return (
        _hidden_gradient(upstream, slopes, weight, ctx.hidden_dtype, ctx.impl) if for_hidden else None,
        (upstream * weight_gradient).to(weight.dtype) if for_weight else None,
        (upstream * bias_gradient).to(ctx.bias_dtype) if for_bias else None,
        *(None,) * 7,
    )


_detection.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("fused_objectives::detection_hidden_gradient", mutates_args=())
def _hidden_gradient(
    upstream: torch.Tensor, slopes: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    """Return upstream · slopes ⊗ weight, ``[N, d]``."""
    if not (uses_triton(impl, slopes) and len(slopes) and len(weight)):
        return ((upstream * slopes)[:, None] * weight.float()).to(dtype)
    tokens, width = len(slopes), len(weight)
    gradient = slopes.new_empty(tokens, width, dtype=dtype)
    columns = _columns(width)
    detection_hidden_gradient_kernel[(-(-tokens // _ROWS),)](
        upstream,
        slopes,
        weight.contiguous(),
        gradient,
        tokens,
        width,
        ROWS=_ROWS,
        BLOCK_D=columns,
        num_warps=columns // _WARP,
    )
    return gradient


@_hidden_gradient.register_fake
def _(upstream, slopes, weight, dtype, impl):
    return slopes.new_empty(len(slopes), len(weight), dtype=dtype)


@register_flop_formula(torch.ops.fused_objectives.detection_hidden_gradient)
def _hidden_gradient_flops(upstream, slopes, weight, *_, **__):
    """An outer product."""
    return 2 * slopes[0] * weight[0]


def _detect_torch(hidden, weight, bias, labels, segments, samples, sample_weights, token_weights, gradients):
    """Do what the kernels do by plain torch."""
    owner = owners(segments, samples)
    real = (labels != IGNORED) & (owner < samples)
    wide = hidden.float().contiguous()  # sums in the same order for all strides
    logits = wide @ weight.float().contiguous()
    logits = torch.where(real, logits if bias is None else logits + bias.float(), 0)
    signed = torch.where(labels == 1, -logits, torch.where(labels == 0, logits, torch.nan))
    per_token = torch.where(real, signed.clamp(min=0) + torch.log1p(torch.exp(-signed.abs())), 0)

    weighted = per_token if token_weights is None else per_token * token_weights.float()
    sums = span_sums(weighted, segments, samples, "torch")
    counts = owner.new_zeros(samples + 1).index_add(0, owner, real.long())[:samples]
    total = sums.sum() if sample_weights is None else (sums * sample_weights.float()).sum()
    results = total, sums, counts, per_token, logits
    if not gradients:
        return *results, *(logits.new_empty(0) for _ in range(3))

    slopes = torch.where(labels == 1, -torch.sigmoid(signed), torch.sigmoid(signed))
    if sample_weights is not None:
        slopes = slopes * spread(sample_weights.float(), segments)
    if token_weights is not None:
        slopes = slopes * token_weights.float()
    slopes = torch.where(real, slopes, 0)
    if wide.is_cuda or not real.all():  # a GPU's host must not wait for the answer
        wide = torch.where(real[:, None], wide, 0)  # 0 times what padding holds may be NaN
    return *results, slopes, slopes @ wide, slopes.sum().view(1)


def _detect(hidden, weight, bias, labels, segments, samples, sample_weights, token_weights, gradients):
    """Launch the kernels: one over the tokens, one that adds up."""
    tokens, width = hidden.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    labels, segments = labels.contiguous(), segments.contiguous()
    sample_weights = None if sample_weights is None else sample_weights.contiguous()
    token_weights = None if token_weights is None else token_weights.contiguous()
    columns = _columns(width)
    programs = min(-(-tokens // _ROWS), _programs(columns, hidden.device))

    def floats(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    per_token, logits = floats(tokens), floats(tokens)
    slopes, weight_gradient, bias_gradient = map(floats, (tokens, width, 1) if gradients else (0, 0, 0))
    parts = floats(programs, _PARTS + (width if gradients else 0))
    detection_kernel[(programs,)](
        hidden,
        weight.contiguous(),
        bias,
        labels,
        segments,
        sample_weights,
        token_weights,
        per_token,
        logits,
        slopes,
        parts,
        tokens,
        samples,
        width,
        hidden.stride(0),
        GRADIENTS=gradients,
        PARTS=_PARTS,
        ROWS=_ROWS,
        BLOCK_D=columns,
        num_warps=columns // _WARP,
    )
    starts, ends = spans(segments, samples, "triton")
    total, sums, counts = floats(), floats(samples), starts.new_empty(samples)
    detection_sums_kernel[(samples + -(-parts.shape[1] // _PARTS),)](
        per_token,
        token_weights,
        labels,
        starts,
        ends,
        sums,
        counts,
        parts,
        total,
        bias_gradient,
        weight_gradient,
        samples,
        programs,
        parts.shape[1],
        BLOCK=_BLOCK,
        PARTS=_PARTS,
    )
    return total, sums, counts, per_token, logits, slopes, weight_gradient, bias_gradient


def _columns(width: int) -> int:
    """Return how many columns a program holds."""
    if width > WIDEST:
        raise ValueError(f"hidden: width {width} is above {WIDEST}; use impl='torch'")
    return max(256, 1 << (width - 1).bit_length())


def _programs(columns: int, device: torch.device) -> int:
    """Return how many programs share the rows: 16 warps a multiprocessor, which its registers hold at once; few in the
    interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * 16 * _WARP // columns


@jit(do_not_specialize=["tokens", "samples"])
def detection_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    labels_ptr,
    segments_ptr,
    sample_weights_ptr,
    token_weights_ptr,
    per_token_ptr,
    logits_ptr,
    slopes_ptr,
    parts_ptr,
    tokens,
    samples,
    width,
    hidden_stride,
    GRADIENTS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles of whole rows in turn to the programs. Each writes a row of parts that are then added up: of the total and,
    with GRADIENTS, of the gradients of the bias and, from column PARTS on, the weight."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    within = columns < width
    weight = tl.load(weight_ptr + columns, mask=within, other=0.0).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr).to(tl.float32)
    weight_part = tl.zeros([BLOCK_D], tl.float32)
    bias_part = tl.zeros([ROWS], tl.float32)
    total_part = tl.zeros([ROWS], tl.float32)
    for first in range(program * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = rows < tokens
        label = tl.load(labels_ptr + rows, mask=inside, other=-100)
        segment = tl.load(segments_ptr + rows, mask=inside, other=-1)
        real = (label != -100) & (segment >= 0) & (segment < samples)
        places = rows[:, None] * hidden_stride + columns[None, :]
        hidden = tl.load(hidden_ptr + places, mask=real[:, None] & within[None, :], other=0.0).to(tl.float32)
        logit = tl.where(real, tl.sum(hidden * weight[None, :], 1) + bias, 0.0)
        signed = tl.where(label == 1, -logit, logit)
        small = tl.where((label == 0) | (label == 1), tl.exp(-tl.abs(signed)), float("nan"))
        loss = tl.where(real, tl.maximum(signed, 0.0) + _log1p(small), 0.0)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if sample_weights_ptr is not None:
            scale *= tl.load(sample_weights_ptr + segment, mask=real, other=0.0).to(tl.float32)
        if token_weights_ptr is not None:
            scale *= tl.load(token_weights_ptr + rows, mask=real, other=0.0).to(tl.float32)
        total_part += scale * loss
        tl.store(logits_ptr + rows, logit, mask=inside)
        tl.store(per_token_ptr + rows, loss, mask=inside)
        if GRADIENTS:
            slope = scale * tl.where(signed >= 0, 1.0, small) / (1.0 + small)
            slope = tl.where(real, tl.where(label == 1, -slope, slope), 0.0)
            tl.store(slopes_ptr + rows, slope, mask=inside)
            weight_part += tl.sum(slope[:, None] * hidden, 0)
            bias_part += slope
    head = tl.arange(0, PARTS)
    if GRADIENTS:
        parts_ptr += program * (PARTS + width)
        tl.store(parts_ptr + PARTS + columns, weight_part, mask=within)
    else:
        parts_ptr += program * PARTS
    tl.store(parts_ptr + head, tl.where(head == 0, tl.sum(total_part), tl.where(head == 1, tl.sum(bias_part), 0.0)))


@jit(do_not_specialize=["samples", "rows", "columns"])
def detection_sums_kernel(
    per_token_ptr,
    token_weights_ptr,
    labels_ptr,
    starts_ptr,
    ends_ptr,
    sums_ptr,
    counts_ptr,
    parts_ptr,
    total_ptr,
    bias_gradient_ptr,
    weight_gradient_ptr,
    samples,
    rows,
    columns,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The first programs add up a sample each, the others PARTS columns each of the parts."""
    program = tl.program_id(0)
    if program < samples:
        end = tl.load(ends_ptr + program)
        total = tl.zeros([BLOCK], tl.float32)
        count = tl.zeros([BLOCK], tl.int64)
        for first in range(tl.load(starts_ptr + program), end, BLOCK):
            places = first + tl.arange(0, BLOCK)
            losses = tl.load(per_token_ptr + places, mask=places < end, other=0.0)
            if token_weights_ptr is not None:
                losses *= tl.load(token_weights_ptr + places, mask=places < end, other=0.0).to(tl.float32)
            total += losses
            count += (tl.load(labels_ptr + places, mask=places < end, other=-100) != -100).to(tl.int64)
        tl.store(sums_ptr + program, tl.sum(total))
        tl.store(counts_ptr + program, tl.sum(count))
    else:
        column = (program - samples) * PARTS + tl.arange(0, PARTS)
        parts = tl.zeros([256, PARTS], tl.float32)
        within = column < columns
        for above in range(0, rows, 256):
            row = above + tl.arange(0, 256)
            parts_places = row[:, None] * columns + column[None, :]
            parts += tl.load(parts_ptr + parts_places, mask=(row < rows)[:, None] & within[None, :], other=0.0)
        sums = tl.sum(parts, 0)
        tl.store(total_ptr + column, sums, mask=column == 0)
        tl.store(bias_gradient_ptr + column - 1, sums, mask=(column == 1) & (columns > PARTS))
        tl.store(weight_gradient_ptr + column - PARTS, sums, mask=(column >= PARTS) & within)


@jit
def _log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1, accurate for small x too: what rounding 1 + x errs cancels (Goldberg 1991)."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@jit(do_not_specialize=["tokens"])
def detection_hidden_gradient_kernel(
    upstream_ptr,
    slopes_ptr,
    weight_ptr,
    gradient_ptr,
    tokens,
    width,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile of whole rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    slopes = tl.load(slopes_ptr + rows, mask=rows < tokens, other=0.0) * tl.load(upstream_ptr)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    places = rows[:, None] * width + columns[None, :]
    gradient = (slopes[:, None] * weight[None, :]).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + places, gradient, mask=(rows < tokens)[:, None] & (columns < width)[None, :])


def _configurations():
    weights = {"sample_weights_ptr": "*fp32", "token_weights_ptr": "*fp32"}
    sizes = {"tokens": "i32", "width": "i32:16"}
    forward = {"tokens": "i32", "samples": "i32", "width": "i32:16", "hidden_stride": "i32:16"}
    for dtype in ("*bf16", "*fp32"):
        for columns in (256, 512, 1024, WIDEST):
            tile, warps = {"ROWS": _ROWS, "BLOCK_D": columns}, columns // _WARP
            inputs = {"hidden_ptr": dtype, "weight_ptr": dtype, "bias_ptr": dtype}
            inputs |= {"labels_ptr": "*i64", "segments_ptr": "*i64"} | weights
            outputs = ("per_token_ptr", "logits_ptr", "slopes_ptr", "parts_ptr")
            signature = inputs | dict.fromkeys(outputs, "*fp32") | forward
            yield Configuration(detection_kernel, signature, {"GRADIENTS": True, "PARTS": _PARTS} | tile, warps)
            if columns == 1024:  # the least that can be asked for
                absent = dict.fromkeys(("bias_ptr", *weights))
                signature = {name: kind for name, kind in signature.items() if name not in absent}
                yield Configuration(
                    detection_kernel, signature, absent | {"GRADIENTS": False, "PARTS": _PARTS} | tile, warps
                )
            inputs = {"upstream_ptr": "*fp32", "slopes_ptr": "*fp32", "weight_ptr": dtype, "gradient_ptr": dtype}
            yield Configuration(detection_hidden_gradient_kernel, inputs | sizes, tile, warps)

    sums = {"per_token_ptr": "*fp32", "token_weights_ptr": "*fp32", "labels_ptr": "*i64", "starts_ptr": "*i64"}
    sums |= {"ends_ptr": "*i64", "sums_ptr": "*fp32", "counts_ptr": "*i64", "parts_ptr": "*fp32"}
    sums |= {"total_ptr": "*fp32", "bias_gradient_ptr": "*fp32", "weight_gradient_ptr": "*fp32"}
    sums |= {"samples": "i32", "rows": "i32", "columns": "i32"}
    yield Configuration(detection_sums_kernel, sums, {"BLOCK": _BLOCK, "PARTS": _PARTS})


CONFIGURATIONS = list(_configurations())
