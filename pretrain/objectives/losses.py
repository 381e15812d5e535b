"""What losses at target places have in common: only targets meet the head, and the head's logits stay in chunks."""

import torch
from torch import nn

from fused_objectives.targets import IGNORED, compact
from pretrain.data.batch import Batch
from pretrain.model.attention import Layout
from pretrain.model.generator import Generator
from pretrain.model.rows import rows_of
from pretrain.objectives.base import LabelledView, TermLoss
from pretrain.objectives.scores import CrossEntropyScore, DetectionScore, SamplingScore


def vocabulary_loss(
    head: nn.Module, hidden: torch.Tensor, view: LabelledView, weights: torch.Tensor | None, impl: str
) -> TermLoss:
    """Return the cross entropies of a view's labels.

    Args:
        head: :class:`pretrain.model.encoder.VocabularyHead`.
        hidden: ``[rows, length, hidden]``.
        view: its labels say where the targets are.
        weights: ``[S]`` float32 or None, the samples' weights.
        impl: which implementation the op takes.
    """
    samples = len(view.batch.sample_ids)
    return cross_entropies(head, hidden, view.labels, view.batch.segment_ids, samples, view.capacity, weights, impl)


def cross_entropies(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    samples: int,
    capacity: int | None,
    weights: torch.Tensor | None,
    impl: str,
) -> TermLoss:
    """Return the cross entropies of ``labels [rows, length]``, whose places belong to samples as ``segments`` say; the
    other arguments are those of :func:`vocabulary_loss`."""
    labels = labels.reshape(-1)
    targets = compact(labels != IGNORED, capacity)
    segments = targets.take(segments.reshape(-1), padding=-1)
    score = CrossEntropyScore(targets.take(labels, padding=IGNORED), segments, samples, weights, impl)
    with rows_of(segments):
        loss = head(targets.take(hidden.flatten(0, 1)), score)
    return TermLoss(loss.total + targets.overflow, loss.sums + targets.overflow)


def token_detection_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    batch: Batch,
    weights: torch.Tensor | None,
    impl: str,
    token_weights: torch.Tensor | None = None,
) -> tuple[TermLoss, torch.Tensor]:
    """Return the binary cross entropies of all tokens of a batch, and what the head says of them.

    Args:
        head: :class:`pretrain.model.detection_head.DetectionHead`.
        hidden: ``[rows, length, hidden]``.
        labels: ``[rows, length]`` int64: 1 where a token was tampered with, 0 elsewhere, ``IGNORED`` on padding.
        batch: which sample every token belongs to.
        weights: ``[S]`` float32 or None, the samples' weights.
        impl: which implementation the op takes.
        token_weights: ``[rows, length]`` float32 or None, factors on the tokens' losses.

    Returns:
        the loss, and ``[rows, length]`` bool: tokens that the head takes for tampered with.
    """
    places = compact(batch.real.reshape(-1))
    labels = places.take(labels.reshape(-1), padding=IGNORED)
    segments = places.take(batch.segment_ids.reshape(-1), padding=-1)
    if token_weights is not None:
        token_weights = places.take(token_weights.reshape(-1))
    score = DetectionScore(labels, segments, len(batch.sample_ids), weights, impl, token_weights)
    with rows_of(segments):
        loss = head(places.take(hidden.flatten(0, 1)), score)
    accused = torch.cat([loss.logits > 0, loss.logits.new_zeros(1, dtype=torch.bool)])[places.slots]  # −1 is the last
    return TermLoss(loss.total, loss.sums), accused.view_as(batch.tokens)


def generator_loss(
    generator: Generator,
    view: LabelledView,
    layout: Layout,
    weights: torch.Tensor | None,
    *,
    seed: int,
    stream: str,
    impl: str,
) -> tuple[TermLoss, tuple[torch.Tensor, torch.Tensor]]:
    """Return a generator's cross entropies of a view's labels, and a token drawn at each of them.

    Args:
        generator: reads the view's tokens; tokens are drawn at its temperature.
        view: its labels say where the targets are.
        layout: of the view's batch.
        weights: ``[S]`` float32 or None, the samples' weights.
        seed, stream: key of the draws.
        impl: which implementation the op takes.

    Returns:
        the loss; and the draws as ``slots [rows, length]`` int64, each place's index among them or −1, and the tokens
        ``[K]`` int64 themselves.
    """
    batch, labels = view.batch, view.labels.reshape(-1)
    targets = compact(labels != IGNORED, view.capacity)
    segments = targets.take(batch.segment_ids.reshape(-1), padding=-1)
    score = SamplingScore(
        targets.take(labels, padding=IGNORED),
        segments,
        len(batch.sample_ids),
        weights,
        impl,
        targets.take(batch.position_ids.reshape(-1)),
        batch.sample_ids,
        batch.visits,
        seed,
        stream,
        generator.temperature,
    )
    with rows_of(segments):
        loss, tokens = generator(view.tokens, layout, targets, score)
    term = TermLoss(loss.total + targets.overflow, loss.sums + targets.overflow)
    return term, (targets.slots.view_as(batch.tokens), tokens)
