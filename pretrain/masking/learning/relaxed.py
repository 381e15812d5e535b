"""Masks that a policy's scores can be trained through: top-k of perturbed scores, and their smooth counterpart."""

from typing import NamedTuple

import torch

from fused_objectives import draws
from fused_objectives.philox import uniform
from pretrain.data.batch import Batch

_HALVINGS = 60  # of an interval in float64: enough for the last bit


class RelaxedMask(NamedTuple):
    """A mask and what its gradient is taken of."""

    hard: torch.Tensor
    """``[rows, length]`` bool: the hidden tokens."""
    soft: torch.Tensor
    """``[rows, length]`` in 0..1, of the scores' dtype, 0 where not eligible; sums to the hidden tokens of each sample;
    differentiable by the scores."""


def gumbel_noise(batch: Batch, seed: int, stream: str) -> torch.Tensor:
    """Return standard Gumbel noise for every place of a batch, ``[rows, length]`` float32: a function of (seed, stream,
    sample, visit, position). On padding it means nothing."""
    word, *_ = draws.words(seed, stream, batch.position_ids, batch.segment_ids, batch.sample_ids, batch.visits)
    return -(-(uniform(word) + 2.0**-33).log()).log().float()


def hidden_per_sample(batch: Batch, eligible: torch.Tensor, rate: float) -> torch.Tensor:
    """Return how many tokens of each sample are hidden, ``[S]`` int64: ``rate`` of the eligible ones, rounded, and at
    least one where there is one."""
    counts = batch.sum_per_sample(eligible.long())
    return (rate * counts.double() + 0.5).floor().long().clamp(min=1).minimum(counts)


def relaxed_top_k(
    scores: torch.Tensor, eligible: torch.Tensor, batch: Batch, rate: float, temperature: float
) -> RelaxedMask:
    """Hide the tokens of each sample that score highest.

    With Gumbel noise in the scores this draws without replacement from their softmax (Gumbel top-k, arXiv 1903.06059).
    The soft mask is σ(scores / temperature − τ), with the one τ for each sample that makes it sum to the number of
    hidden tokens; τ is differentiated too, so that no change of the scores hides more in sum. Samples do not touch.

    Args:
        scores: ``[rows, length]`` floating, the noise included.
        eligible: ``[rows, length]`` bool: tokens that may be hidden.
        batch: which sample every place belongs to.
        rate: share of the eligible tokens of a sample to hide, see :func:`hidden_per_sample`.
        temperature: above 0; the lower, the closer the soft mask is to the hard one.
    """
    count = hidden_per_sample(batch, eligible, rate)
    hard = (_ranks(scores.detach(), eligible, batch) < _spread(batch, count)) & eligible
    scaled = torch.where(eligible, scores, 0.0).double() / temperature
    fixed = scaled.detach()
    threshold = _thresholds(fixed, eligible, batch, count)
    slope = torch.where(eligible, _sigmoid_slope(fixed - _spread(batch, threshold)), 0.0)
    drift = batch.sum_per_sample(slope * (scaled - fixed)) / batch.sum_per_sample(slope).clamp(min=1e-30)
    soft = torch.where(eligible, torch.sigmoid(scaled - _spread(batch, threshold + drift)), 0.0)
    return RelaxedMask(hard, soft.to(scores.dtype))


def _thresholds(scaled: torch.Tensor, eligible: torch.Tensor, batch: Batch, count: torch.Tensor) -> torch.Tensor:
    """Return ``[S]`` float64: the τ for which σ(scaled − τ) sums to ``count`` over a sample's eligible tokens."""
    bound = scaled.abs().amax() + 50.0 if scaled.numel() else scaled.new_zeros(())
    low, high = (bound.expand(len(count)) * sign for sign in (-1.0, 1.0))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        total = batch.sum_per_sample(torch.where(eligible, torch.sigmoid(scaled - _spread(batch, middle)), 0.0))
        low, high = torch.where(total > count, middle, low), torch.where(total > count, high, middle)
    return (low + high) / 2


def _ranks(scores: torch.Tensor, eligible: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return each place's rank among those of its sample, ``[rows, length]`` int64: 0 for the eligible place with the
    highest score, the first of equals before the second."""
    flat, segments = torch.where(eligible, scores, -torch.inf).reshape(-1), batch.segment_ids.reshape(-1)
    by_score = flat.argsort(descending=True, stable=True)
    order = by_score[segments[by_score].argsort(stable=True)]
    places = segments.new_zeros(len(batch.sample_ids) + 1).index_add(0, segments + 1, torch.ones_like(segments))
    first = places.cumsum(0) - places
    rank = torch.arange(len(order), device=order.device) - first[segments[order] + 1]
    return torch.empty_like(order).scatter(0, order, rank).view_as(scores)


def _sigmoid_slope(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _spread(batch: Batch, values: torch.Tensor) -> torch.Tensor:
    """Return each place's sample's entry of ``values [S]``, 0 on padding."""
    return torch.nn.functional.pad(values, (1, 0))[batch.segment_ids + 1]
