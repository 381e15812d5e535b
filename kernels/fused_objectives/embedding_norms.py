"""Per-sample gradient norms of an embedding, and of one whose matrix is also the vocabulary head's."""

import torch

from fused_objectives.backend import Configuration, jit, not_differentiable, tl, uses_triton
from fused_objectives.checks import FLOATING, INTEGER, check
from fused_objectives.gram import ALIGNMENT, aligned, gram_row_sums, inner_columns
from fused_objectives.segments import checked, per_token, runs, span_sums, spans

_BLOCK, _WARPS = 64, 8
_TORCH_ROWS = 256


@not_differentiable
def embedding_norms(
    gradients: torch.Tensor, tokens: torch.Tensor, segments: torch.Tensor, samples: int, *, impl: str = "auto"
) -> torch.Tensor:
    """Return each sample's squared gradient norm of an embedding, Σ_v ‖Σ_{t: token_t = v} g_t‖², ``[S]`` float32.

    It is the sum of g_t·g_u over the pairs of equal tokens; nothing of the vocabulary's size is made. Not
    differentiable.

    Args:
        gradients: ``[N, d]`` floating, gradients at the embedding's outputs.
        tokens: ``[N]`` integers, what was looked up; position or type ids must be spread over the rows likewise.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which may hold anything.
        samples: S.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    Td FLOPs and more a token, for samples of T tokens: small beside the model's. Memory as of
    :func:`fused_objectives.gram.gram_row_sums`.
    """
    tensors = {"gradients": (gradients, "Nd", FLOATING), "tokens": (tokens, "N", INTEGER)}
    check(tensors | {"segments": (segments, "N", INTEGER)}, impl, samples)
    return _embedding_norms(gradients, tokens, segments, samples, impl)


@not_differentiable
def tied_cross_term(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    target_segments: torch.Tensor,
    log_normalizers: torch.Tensor,
    tokens: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    *,
    bias: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return each sample's ⟨D, S⟩, ``[S]`` float32: of the gradient D that a matrix gets as vocabulary head and the
    gradient S that it gets as embedding. The squared norm of the tied matrix is ‖D‖² + ‖S‖² + 2⟨D, S⟩.

    ⟨D, S⟩ = Σ_m Σ_t u_m e_m(token_t) (h_m·g_t) over a sample's targets m and tokens t, with the loss's derivative by a
    logit e_m(v) = ((1 + 2ζ·lse_m) p_m(v) − ε/V − (1 − ε) 1[v = y_m]) · (1 − (z_m(v)/cap)²), the last factor with a soft
    cap only. Logits are formed for the sample's own tokens, not for the vocabulary. Not differentiable.

    Args:
        hidden: ``[K, d]`` floating, inputs of the head at the targets.
        weight: ``[V, d]``, the tied matrix. It and ``gradients`` are rounded to the dtype of ``hidden``.
        targets: ``[K]`` integers; negative where there is none.
        target_segments: ``[K]`` integers, the sample of each target; a sample's targets are one contiguous run; −1
            where there is none.
        log_normalizers: ``[K]`` float32, the logsumexp of each target's (soft-capped) logits.
        tokens: ``[N]`` integers, what the embedding looked up.
        gradients: ``[N, d]`` floating, gradients at the embedding's outputs.
        segments: ``[N]`` integers, which sample a token belongs to; a sample's tokens are one contiguous run; −1 is
            padding, which may hold anything.
        samples: S.
        bias: ``[V]`` floating, of the head.
        token_weights: ``[K]`` floating, u; None weighs all targets by 1.
        label_smoothing, z_loss, soft_cap: ε, ζ and the cap as of the loss.

    Raises:
        ValueError: for shapes, dtypes or segments that are not so.

    4d FLOPs for each pair of a target and a token of its sample; reads a row of ``weight`` a token.
    """
    tensors = {
        "hidden": (hidden, "Kd", FLOATING),
        "weight": (weight, "Vd", FLOATING),
        "targets": (targets, "K", INTEGER),
        "target_segments": (target_segments, "K", INTEGER),
        "log_normalizers": (log_normalizers, "K", FLOATING),
        "gradients": (gradients, "Nd", FLOATING),
        "tokens": (tokens, "N", INTEGER),
        "segments": (segments, "N", INTEGER),
        "bias": (bias, "V", FLOATING),
        "token_weights": (token_weights, "K", FLOATING),
    }
    check(tensors, impl, samples)
    return _tied_cross_term(
        hidden,
        weight,
        targets,
        target_segments,
        log_normalizers,
        tokens,
        gradients,
        segments,
        samples,
        bias,
        token_weights,
        label_smoothing,
        z_loss,
        soft_cap,
        impl,
    )


@torch.library.custom_op("fused_objectives::embedding_norms", mutates_args=())
def _embedding_norms(
    gradients: torch.Tensor, tokens: torch.Tensor, segments: torch.Tensor, samples: int, impl: str
) -> torch.Tensor:
    segments = checked(segments, samples)
    if not uses_triton(impl, gradients):
        return _embedding_norms_torch(gradients, tokens, segments, samples)
    first, last = (per_token(bounds, segments) for bounds in spans(segments, samples, impl))
    sums = gram_row_sums(
        None, gradients, None, gradients, first, last, symmetric=True, left_ids=tokens, right_ids=tokens, impl=impl
    )
    return span_sums(sums, segments, samples, impl).clamp(min=0)


@_embedding_norms.register_fake
def _(gradients, tokens, segments, samples, impl):
    return gradients.new_empty(samples, dtype=torch.float32)


def _embedding_norms_torch(gradients, tokens, segments, samples):
    """The twin: adds up the gradients of equal tokens, one sample after the other."""
    norms = gradients.new_zeros(samples, dtype=torch.float32)
    for sample, ids, rows in runs(segments, tokens, gradients):
        different, which = ids.unique(return_inverse=True)
        sums = norms.new_zeros(len(different), rows.shape[1]).index_add_(0, which, rows.float())
        norms[sample] = sums.square().sum()
    return norms


@torch.library.custom_op("fused_objectives::tied_cross_term", mutates_args=())
def _tied_cross_term(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    target_segments: torch.Tensor,
    log_normalizers: torch.Tensor,
    tokens: torch.Tensor,
    gradients: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    bias: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    impl: str,
) -> torch.Tensor:
    segments, target_segments = checked(segments, samples), checked(target_segments, samples, "target_segments")
    owners = torch.where(targets < 0, -1, target_segments)  # may have gaps within a run
    tokens = torch.where(segments < 0, 0, tokens.long())  # rows of the matrix are read for padding within a tile, too
    first, last = (per_token(bounds, owners) for bounds in spans(segments, samples, impl))
    launch = _tied_cross_term_triton if uses_triton(impl, hidden) else _tied_cross_term_torch
    operands = (hidden, weight, targets, log_normalizers, tokens, gradients, bias)
    sums = launch(*operands, first, last, label_smoothing, z_loss, soft_cap)
    if token_weights is not None:
        sums = torch.where(token_weights == 0, 0.0, sums * token_weights.float())
    return span_sums(sums, target_segments, samples, impl)


@_tied_cross_term.register_fake
def _(hidden, weight, targets, target_segments, log_normalizers, tokens, gradients, segments, samples, *_):
    return hidden.new_empty(samples, dtype=torch.float32)


def _tied_cross_term_torch(
    hidden, weight, targets, log_normalizers, tokens, gradients, bias, first, last, label_smoothing, z_loss, soft_cap
):
    """The twin: blocks of targets against all the tokens that any of them meets. One sum a target, ``[K]`` float32."""
    sums = hidden.new_zeros(len(hidden), dtype=torch.float32)
    for block in torch.arange(len(sums), device=sums.device).split(_TORCH_ROWS):
        block = block[first[block] < last[block]]
        if not len(block):
            continue
        columns = torch.arange(int(first[block].min()), int(last[block].max()), device=sums.device)
        looked_up = tokens[columns]
        states = hidden[block].float()
        logits = states @ weight[looked_up].to(hidden.dtype).float().T
        if bias is not None:
            logits += bias[looked_up].float()
        damping = 1.0
        if soft_cap is not None:
            ratio = torch.tanh(logits / soft_cap)
            logits, damping = soft_cap * ratio, 1 - ratio * ratio
        normalizers = log_normalizers[block, None].float()
        errors = (1 + 2 * z_loss * normalizers) * torch.exp(logits - normalizers) - label_smoothing / len(weight)
        errors -= torch.where(looked_up == targets[block, None], 1 - label_smoothing, 0.0)
        products = errors * damping * (states @ gradients[columns].to(hidden.dtype).float().T)
        counts = (first[block, None] <= columns) & (columns < last[block, None])
        sums[block] = torch.where(counts, products, 0.0).sum(1)
    return sums


def _tied_cross_term_triton(
    hidden, weight, targets, log_normalizers, tokens, gradients, bias, first, last, label_smoothing, z_loss, soft_cap
):
    sums = hidden.new_empty(len(hidden), dtype=torch.float32)
    if len(sums) == 0:
        return sums
    operands = [aligned(operand) for operand in (hidden, weight, gradients)]
    vectors = [vector.contiguous() for vector in (targets, log_normalizers.float(), tokens)]
    tied_kernel[(-(-len(sums) // _BLOCK),)](
        *operands,
        *vectors,
        sums if bias is None else bias.contiguous(),
        first,
        last,
        sums,
        *(operand.stride(0) // ALIGNMENT for operand in operands),
        len(sums),
        operands[0].shape[1] // ALIGNMENT,
        1 - label_smoothing,
        label_smoothing / len(weight),
        z_loss,
        1.0 if soft_cap is None else soft_cap,
        HAS_BIAS=bias is not None,
        SOFT_CAP=soft_cap is not None,
        BLOCK=_BLOCK,
        INNER=inner_columns(hidden.dtype),
        ALIGNMENT=ALIGNMENT,
        num_warps=_WARPS,
    )
    return sums


@jit
def _tanh(x):
    """Hyperbolic tangent, as accurate near 0 as elsewhere."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.01, series, 1 - 2 / (tl.exp(2 * x) + 1))


@jit(do_not_specialize=["rows", "target_share", "smoothing", "z_loss", "soft_cap"])
def tied_kernel(
    hidden_ptr,
    weight_ptr,
    gradients_ptr,
    targets_ptr,
    log_normalizers_ptr,
    tokens_ptr,
    bias_ptr,
    first_ptr,
    last_ptr,
    sums_ptr,
    hidden_stride,
    weight_stride,
    gradients_stride,
    rows,
    width,
    target_share,
    smoothing,
    z_loss,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program a tile of targets, against tiles of all the tokens that any of them meets. Strides and width count
    units of ALIGNMENT numbers, from which the compiler learns how they are aligned."""
    hidden_stride *= ALIGNMENT
    weight_stride *= ALIGNMENT
    gradients_stride *= ALIGNMENT
    width *= ALIGNMENT
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = m < rows
    first = tl.load(first_ptr + m, mask=inside, other=0)
    last = tl.load(last_ptr + m, mask=inside, other=0)
    counted = first < last
    lowest = tl.min(tl.where(counted, first, 0x7FFFFFFFFFFFFFFF))
    highest = tl.max(tl.where(counted, last, 0))
    targets = tl.load(targets_ptr + m, mask=inside, other=-1)
    normalizers = tl.load(log_normalizers_ptr + m, mask=inside, other=0.0)
    hidden_at = (m * hidden_stride)[:, None]
    inner = tl.arange(0, INNER)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(lowest, highest, BLOCK):
        t = start + tl.arange(0, BLOCK)
        exists = t < highest
        tokens = tl.load(tokens_ptr + t, mask=exists, other=0).to(tl.int64)
        weight_at = (tokens * weight_stride)[:, None]
        gradients_at = (t * gradients_stride)[:, None]
        logits = tl.zeros([BLOCK, BLOCK], tl.float32)
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
        for column in range(0, width, INNER):
            fits = column + inner < width
            hidden = tl.load(hidden_ptr + hidden_at + column + inner, mask=counted[:, None] & fits, other=0.0)
            fits = exists[:, None] & fits
            weight = tl.load(weight_ptr + weight_at + column + inner, mask=fits, other=0.0).to(hidden.dtype)
            gradients = tl.load(gradients_ptr + gradients_at + column + inner, mask=fits, other=0.0).to(hidden.dtype)
            logits = tl.dot(hidden, tl.trans(weight), logits, input_precision="ieee")
            products = tl.dot(hidden, tl.trans(gradients), products, input_precision="ieee")
        if HAS_BIAS:
            logits += tl.load(bias_ptr + tokens, mask=exists, other=0.0).to(tl.float32)
        if SOFT_CAP:
            ratio = _tanh(logits / soft_cap)
            logits = soft_cap * ratio
            products *= 1 - ratio * ratio
        errors = (1 + 2 * z_loss * normalizers)[:, None] * tl.exp(logits - normalizers[:, None]) - smoothing
        errors -= tl.where(tokens == targets[:, None], target_share, 0.0)
        counts = (first[:, None] <= t) & (t < last[:, None])
        sums += tl.sum(tl.where(counts, errors * products, 0.0), 1)
    tl.store(sums_ptr + m, sums, mask=inside)


CONFIGURATIONS = [
    Configuration(
        tied_kernel,
        {name: f"*{element}" for name in ("hidden_ptr", "weight_ptr", "gradients_ptr")}
        | {"targets_ptr": "*i64", "log_normalizers_ptr": "*fp32", "tokens_ptr": "*i64", "bias_ptr": f"*{element}"}
        | {"first_ptr": "*i64", "last_ptr": "*i64", "sums_ptr": "*fp32"}
        | {"hidden_stride": "i64", "weight_stride": "i64", "gradients_stride": "i64", "rows": "i64", "width": "i32"}
        | {name: "fp32" for name in ("target_share", "smoothing", "z_loss", "soft_cap")},
        {"HAS_BIAS": bias, "SOFT_CAP": cap, "BLOCK": _BLOCK, "INNER": inner_columns(dtype), "ALIGNMENT": ALIGNMENT},
        num_warps=_WARPS,
    )
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for bias in (False, True)
    for cap in (False, True)
]
