"""Swapped token detection (arXiv 2305.03981): tell tokens that changed places within their sample from the others."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import Field

from fused_objectives.swapping import swap_tokens
from fused_objectives.targets import IGNORED, capacity_for
from pretrain.data.batch import Batch
from pretrain.model.attention import Layout
from pretrain.objectives.base import LabelledView, Objective, TermLoss, View, register
from pretrain.objectives.detection import DetectionConfig, TokenDetection, check_generator
from pretrain.objectives.losses import vocabulary_loss

RESTORING = "std/generator"


class STDConfig(DetectionConfig):
    """Keys of ``objectives.std``."""

    generator_weight: float = Field(0.0, ge=0)
    """Factor on the loss of the generator, which reads the swapped tokens as well and is to restore the original ones;
    0: it takes no part. Another objective must train the generator too."""


@dataclass(frozen=True)
class SwappedView(LabelledView):
    """A view with swapped tokens, of which a generator shall restore the original ones."""

    originals: torch.Tensor | None = None
    """``[rows, length]`` int64: the original tokens where another stands now, ``IGNORED`` elsewhere."""


@register
class SwappedTokenDetection(TokenDetection):
    """The chosen tokens of a sample change places; what stands where an equal token stood is not positive."""

    name = "std"
    Config = STDConfig

    @property
    def heads(self) -> tuple[str, ...]:
        return (*super().heads, "generator") if self.config.generator_weight else super().heads

    @property
    def terms(self) -> dict[str, float]:
        weight = self.config.generator_weight
        return {RESTORING: weight, **super().terms} if weight else super().terms

    def meet(self, others: Mapping[str, Objective]) -> None:
        if self.config.generator_weight:
            rest = {name: each for name, each in others.items() if name != self.name}
            check_generator(rest, "objectives.std.generator_weight", "leave it out")

    def corrupt(self, batch: Batch, progress: float) -> View:
        tokens, labels = swap_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.name,
            is_ordinary=self.vocabulary.tables(batch.tokens.device).is_ordinary,
            rate=self.config.rate.at(progress),
            impl=self.impl,
        )
        view = self.view(replace(batch, tokens=tokens), labels)
        if not self.config.generator_weight:
            return view
        most = capacity_for(labels.numel(), max(self.config.rate.values())) if labels.is_cuda else None
        originals = torch.where(labels == 1, batch.tokens, IGNORED)
        counts = {RESTORING: batch.sum_per_sample((labels == 1).long()), **view.counts}
        return SwappedView(view.batch, tokens, counts, view.tallies, labels, most, originals)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        losses = super().loss(model, view, weights)
        if self.config.generator_weight:
            generator, layout = model.heads["generator"], Layout(view.batch, implementation=model.encoder.attention)
            wanted = replace(view, labels=view.originals)
            hidden = generator.encoder(view.tokens, layout)
            losses[RESTORING] = vocabulary_loss(generator.head, hidden, wanted, weights, self.impl)
        return losses
