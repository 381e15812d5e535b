"""What follows a vocabulary head's matrix product: loss, log-normaliser, gradient and sample of each row of logits.

Shared by the linear cross entropy and the generator's sampling, which call it on one chunk of logits after the other.
"""

from typing import NamedTuple

import torch

from fused_objectives.backend import Configuration, jit, tl, uses_triton
from fused_objectives.draws import token_words
from fused_objectives.gumbel import Sampling, gumbel_block, sample
from fused_objectives.philox import stream_id
from fused_objectives.targets import IGNORED

_BLOCK, _WARPS = 1024, 8
ALIGNMENT = 64
"""Rows of logits begin at a multiple of so many entries, for wide loads here and in the matrix products."""
_TORCH_VALUES = 2**17


class Terms(NamedTuple):
    """loss = (1 − ε)(lse − z_y) + ε(lse − mean z) + ζ·lse², of z = cap·tanh(logits / cap)."""

    label_smoothing: float
    """ε."""
    z_loss: float
    """ζ."""
    soft_cap: float | None
    """cap; None leaves the logits as they are."""


def softmax_epilogue(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    weights: torch.Tensor,
    terms: Terms,
    gradient: bool,
    losses: torch.Tensor,
    log_normalizers: torch.Tensor,
    sampling: Sampling | None = None,
    tokens: torch.Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Read logits, and write each row's loss, log-normaliser (lse) and sampled token; all arithmetic is in float32.

    Args:
        logits: ``[n, V]`` floating, without the bias, with contiguous rows a multiple of :data:`ALIGNMENT` apart. With
            ``gradient`` they are replaced by the gradient of weight·loss by them.
        bias: ``[V]`` contiguous float32, or None.
        labels: ``[n]`` contiguous int64. Rows of :data:`IGNORED` get loss, lse and gradient 0 and no token (−1); any
            other label outside 0 .. V − 1 makes the loss and the gradient NaN.
        weights: ``[n]`` contiguous float32.
        losses, log_normalizers: ``[n]`` contiguous float32, written.
        sampling: whose noise perturbs z / temperature; the largest is the row's token. None samples nothing.
        tokens: ``[n]`` contiguous int64, written if ``sampling`` is given.

    Moves V·itemsize bytes a row, with ``gradient`` three times that, of which the second reading is from a cache.
    """
    if uses_triton(impl, logits):
        _launch(logits, bias, labels, weights, terms, gradient, losses, log_normalizers, sampling, tokens)
        return
    block = len(logits) if logits.is_cuda else max(1, _TORCH_VALUES // logits.shape[1])
    for start in range(0, len(logits), max(1, block)):
        part = slice(start, start + block)
        scores = logits[part].float()
        if bias is not None:
            scores = scores + bias
        if terms.soft_cap is not None:
            scores = terms.soft_cap * (scores / terms.soft_cap).tanh()
        if sampling is not None:
            tokens[part] = torch.where(labels[part] == IGNORED, -1, sample(scores, sampling.rows(part)))
        gradients = logits[part] if gradient else None
        losses[part], log_normalizers[part] = _softmax_torch(scores, labels[part], weights[part], terms, gradients)


def _softmax_torch(scores, labels, weights, terms, gradients):
    """The twin on rows few enough to stay in the processor's caches; ``gradients`` is written, unless it is None."""
    smoothing, z_loss, cap = terms
    vocabulary = scores.shape[1]
    is_target, in_range = labels != IGNORED, (labels >= 0) & (labels < vocabulary)
    column = labels.clamp(0, vocabulary - 1)[:, None]
    maximum = scores.amax(1, keepdim=True)
    below = scores - maximum
    at_label = torch.where(in_range, below.gather(1, column)[:, 0], torch.nan)
    mean = below.mean(1) if smoothing else at_label
    exponentials = below.exp_()
    total = exponentials.sum(1)
    lse = maximum[:, 0] + total.log()
    loss = total.log() - torch.lerp(at_label, mean, smoothing) + z_loss * lse.square()
    if gradients is not None:
        weights = torch.where(in_range, weights, torch.where(is_target, torch.nan, 0))
        exponentials *= (weights * (1 + 2 * z_loss * lse) / total)[:, None]
        if smoothing:
            exponentials -= (weights * (smoothing / vocabulary))[:, None]
        exponentials.scatter_add_(1, column, torch.where(in_range, weights * (smoothing - 1), 0)[:, None])
        if cap is not None:
            exponentials *= 1 - (scores / cap).square()
        gradients.copy_(exponentials)
    return torch.where(is_target, loss, 0), torch.where(is_target, lse, 0)


def _launch(logits, bias, labels, weights, terms, gradient, losses, log_normalizers, sampling, tokens):
    if logits.stride(0) % ALIGNMENT:
        raise ValueError(f"rows of logits are {logits.stride(0)} apart, not a multiple of {ALIGNMENT}")
    if len(logits) == 0:
        return
    softmax_epilogue_kernel[(len(logits),)](
        logits,
        logits if bias is None else bias,
        labels,
        weights,
        losses,
        log_normalizers,
        labels if sampling is None else sampling.positions,
        labels if sampling is None else sampling.segments,
        labels if sampling is None else sampling.sample_ids,
        labels if sampling is None else sampling.visits,
        labels if sampling is None else tokens,
        0 if sampling is None else sampling.seed & 0xFFFFFFFF,
        0 if sampling is None else stream_id(sampling.stream),
        logits.stride(0),
        logits.shape[1],
        terms.label_smoothing,
        terms.z_loss,
        terms.soft_cap or 1.0,
        1.0 if sampling is None else sampling.temperature,
        IGNORED=IGNORED,
        HAS_BIAS=bias is not None,
        SOFT_CAP=terms.soft_cap is not None,
        GRADIENT=gradient,
        SAMPLE=sampling is not None,
        BLOCK=_BLOCK,
        ALIGNMENT=ALIGNMENT,
        num_warps=_WARPS,
    )


@jit
def _scores(row_ptr, bias_ptr, columns, inside, soft_cap, HAS_BIAS: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Return z of some columns (−inf where they are not inside), and its derivative by the logits."""
    scores = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if HAS_BIAS:
        scores += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    if SOFT_CAP:
        decay = tl.exp(tl.abs(scores) * (-2.0 / soft_cap))
        tanh = (1.0 - decay) / (1.0 + decay)
        scores = soft_cap * tl.where(scores < 0, -tanh, tanh)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    return tl.where(inside, scores, float("-inf")), slope


@jit(do_not_specialize=["seed", "stream"])
def softmax_epilogue_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    weights_ptr,
    losses_ptr,
    log_normalizers_ptr,
    positions_ptr,
    segments_ptr,
    sample_ids_ptr,
    visits_ptr,
    tokens_ptr,
    seed,
    stream,
    row_stride,
    vocabulary,
    label_smoothing,
    z_loss,
    soft_cap,
    temperature,
    IGNORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One program a row. The first pass reads the row, the second writes the gradient over it."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * tl.multiple_of(row_stride, ALIGNMENT)
    label = tl.load(labels_ptr + row)
    is_target = label != IGNORED
    in_range = (label >= 0) & (label < vocabulary)
    at_label = _scores(row_ptr, bias_ptr, label, in_range, soft_cap, HAS_BIAS, SOFT_CAP)[0]
    at_label = tl.where(in_range, at_label, float("nan"))

    if SAMPLE:
        position, segment = tl.load(positions_ptr + row), tl.load(segments_ptr + row)
        words = token_words(seed, stream, position, segment, segment >= 0, sample_ids_ptr, visits_ptr)
        key = (words[1].to(tl.uint64) << 32) | words[0].to(tl.uint64)
        best_scores = tl.full([BLOCK], float("-inf"), tl.float32)
        best = tl.zeros([BLOCK], tl.int32)
    maximum = float("-inf")
    totals = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.where(is_target, vocabulary, 0), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        scores = _scores(row_ptr, bias_ptr, columns, inside, soft_cap, HAS_BIAS, SOFT_CAP)[0]
        higher = tl.maximum(maximum, tl.max(scores))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but −inf so far: −inf − (−inf) is NaN
        totals = totals * tl.exp(maximum - base) + tl.exp(scores - base)
        maximum = higher
        sums += tl.where(inside, scores, 0.0)
        if SAMPLE:
            perturbed = scores / temperature + gumbel_block(key, start, BLOCK)
            better = perturbed > best_scores  # never for a NaN
            best = tl.where(better, columns, best)
            best_scores = tl.where(better, perturbed, best_scores)
    total = tl.sum(totals)
    lse = maximum + tl.log(total)
    loss = (1 - label_smoothing) * (maximum - at_label) + tl.log(total) + z_loss * lse * lse
    if label_smoothing > 0:  # else a logit of −inf would be multiplied by 0
        loss += label_smoothing * (maximum - tl.sum(sums) / vocabulary)
    tl.store(losses_ptr + row, tl.where(is_target, loss, 0.0))
    tl.store(log_normalizers_ptr + row, tl.where(is_target, lse, 0.0))
    if SAMPLE:
        best = tl.min(tl.where(best_scores == tl.max(best_scores), best, 0x7FFFFFFF))
        tl.store(tokens_ptr + row, tl.where(is_target, best, -1).to(tl.int64))

    if GRADIENT:
        weight = tl.where(in_range, tl.load(weights_ptr + row), float("nan"))
        scale = (1 + 2 * z_loss * lse) / total
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            scores, slope = _scores(row_ptr, bias_ptr, columns, inside & is_target, soft_cap, HAS_BIAS, SOFT_CAP)
            gradient = tl.exp(scores - maximum) * scale - label_smoothing / vocabulary
            gradient -= tl.where(columns == label, 1 - label_smoothing, 0.0)
            gradient = tl.where(is_target, weight * gradient * slope, 0.0)
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def _configurations() -> list[Configuration]:
    signature = {
        "logits_ptr": "",
        "bias_ptr": "*fp32",
        "labels_ptr": "*i64",
        "weights_ptr": "*fp32",
        "losses_ptr": "*fp32",
        "log_normalizers_ptr": "*fp32",
        "positions_ptr": "*i64",
        "segments_ptr": "*i64",
        "sample_ids_ptr": "*i64",
        "visits_ptr": "*i64",
        "tokens_ptr": "*i64",
        "seed": "i64",
        "stream": "i64",
        "row_stride": "i32",
        "vocabulary": "i32",
        "label_smoothing": "fp32",
        "z_loss": "fp32",
        "soft_cap": "fp32",
        "temperature": "fp32",
    }
    flags = [
        {"HAS_BIAS": bias, "SOFT_CAP": cap, "GRADIENT": gradient, "SAMPLE": sampling}
        for bias in (False, True)
        for cap in (False, True)
        for gradient in (False, True)
        for sampling in (False, True)
    ]
    return [
        Configuration(
            softmax_epilogue_kernel,
            signature | {"logits_ptr": f"*{dtype}"} | ({} if flag["HAS_BIAS"] else {"bias_ptr": f"*{dtype}"}),
            {"IGNORED": IGNORED, **flag, "BLOCK": _BLOCK, "ALIGNMENT": ALIGNMENT},
            _WARPS,
        )
        for dtype in ("bf16", "fp32")
        for flag in flags
    ]


CONFIGURATIONS = _configurations()
