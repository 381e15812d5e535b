"""What losses at target places have in common: only targets meet the head, and the head's logits stay in chunks."""

import torch
from torch import nn

from fused_objectives.linear_cross_entropy import linear_cross_entropy
from fused_objectives.targets import IGNORED, compact
from pretrain.objectives.base import LabelledView, TermLoss


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
    labels = view.labels.reshape(-1)
    targets = compact(labels != IGNORED, view.capacity)
    segments = targets.take(view.batch.segment_ids.reshape(-1), padding=-1)
    loss = head(
        targets.take(hidden.flatten(0, 1)),
        lambda features, weight, bias: linear_cross_entropy(
            features,
            weight,
            targets.take(labels, padding=IGNORED),
            segments,
            len(view.batch.sample_ids),
            bias=bias,
            sample_weights=weights,
            impl=impl,
        ),
    )
    return TermLoss(loss.total + targets.overflow, loss.sums)
