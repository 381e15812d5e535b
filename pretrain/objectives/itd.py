"""Inserted token detection (arXiv 2305.03981; "added" in MOMETAS, arXiv 2210.10293): tell inserted tokens from the
sample's own."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from fused_objectives.editing import insert_tokens
from fused_objectives.replacing import replace_tokens
from fused_objectives.targets import IGNORED, capacity_for
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import Objective, TermLoss, View, register
from pretrain.objectives.detection import DetectionConfig, TokenDetection, check_generator
from pretrain.objectives.losses import generator_loss
from pretrain.objectives.unigram import draw_unigram


class ITDConfig(DetectionConfig):
    """Keys of ``objectives.itd``."""

    source: Literal["unigram", "generator"] = "unigram"
    """Where inserted tokens come from: the distribution of tokens in the corpus, or the generator that another
    objective trains, which fills mask tokens."""


@register
class InsertedTokenDetection(TokenDetection):
    """Tokens are inserted into some of the gaps of a sample; all of them are positive, whatever they are.

    A generator learns nothing here: an inserted token has no original.
    """

    name = "itd"
    Config = ITDConfig

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.generates = config.source == "generator"
        if self.generates and vocabulary.mask_id is None:
            raise UserError(
                "objectives.itd.source: the store's tokenizer has no mask token, which 'generator' needs; "
                "set it to unigram"
            )
        self.longest: int | None = None

    def meet(self, others: Mapping[str, Objective]) -> None:
        if self.generates:
            check_generator(others, "objectives.itd.source", "set it to unigram")

    def check(self, encoder: Encoder) -> None:
        super().check(encoder)
        self.longest = encoder.positions

    def row_length(self, length: int) -> int:
        """Return how many places a row of ``length`` places needs with what is inserted, but for one row in 10¹⁵."""
        rate = max(self.config.rate.values())
        needed = length * (1 + rate) + 8 * math.sqrt(length * rate * (1 - rate))
        return math.ceil(needed / 8) * 8

    def corrupt(self, batch: Batch, progress: float) -> View:
        rate = self.config.rate.at(progress)
        edited = insert_tokens(
            batch.tokens,
            batch.segment_ids,
            batch.position_ids,
            batch.sample_ids,
            batch.visits,
            seed=self.seed,
            stream=self.name,
            rate=rate,
            ordinary_ids=self.vocabulary.tables(batch.tokens.device).ordinary_ids,
            insert_id=self.vocabulary.mask_id if self.generates else self.vocabulary.pad_id,
            pad_id=self.vocabulary.pad_id,
            capacity=self.row_length(batch.tokens.shape[1]),
            impl=self.impl,
        )
        longer, labels, cut = self._within_positions(batch.edited(edited), edited.labels)
        if not self.generates:
            drawn = draw_unigram(longer, self.vocabulary, self.seed, "itd/unigram")
            longer = replace(longer, tokens=torch.where(labels == 1, drawn, longer.tokens))
        return self.view(longer, labels, dropped_tokens=edited.dropped.sum() + cut)

    def _within_positions(self, batch: Batch, labels: torch.Tensor) -> tuple[Batch, torch.Tensor, torch.Tensor | int]:
        """Cut the ends of samples for which the backbone has no positions; return also how many tokens that are."""
        if self.longest is None or self.longest >= batch.tokens.shape[1]:
            return batch, labels, 0
        kept = batch.real & (batch.position_ids < self.longest)
        lengths = batch.lengths.clamp(max=self.longest)
        within = replace(
            batch,
            tokens=torch.where(kept, batch.tokens, self.vocabulary.pad_id),
            segment_ids=torch.where(kept, batch.segment_ids, -1),
            position_ids=torch.where(kept, batch.position_ids, 0),
            lengths=lengths,
        )
        return within, torch.where(kept, labels, IGNORED), (batch.lengths - lengths).sum()

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        if not self.generates:
            return super().loss(model, view, weights)
        layout = Layout(view.batch, implementation=model.encoder.attention)
        drawn, overflow = self._generate(model.heads["generator"], view, layout)
        tokens = replace_tokens(view.tokens, view.batch.segment_ids, *drawn, impl=self.impl).tokens
        term = self.detect(model, view, tokens, layout, weights)
        return {self.name: term._replace(total=term.total + overflow)}

    @torch.no_grad()
    def _generate(self, generator, view, layout) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return the generator's draws for the inserted mask tokens, and NaN if there were too many, else 0."""
        # The op draws where there is a target; any will do, as its loss is left alone.
        labels = torch.where(view.labels == 1, self.vocabulary.mask_id, IGNORED)
        most = capacity_for(labels.numel(), max(self.config.rate.values())) if labels.is_cuda else None
        inserted = replace(view, labels=labels, capacity=most)
        loss, drawn = generator_loss(
            generator, inserted, layout, None, seed=self.seed, stream="itd/sample", impl=self.impl
        )
        return drawn, torch.where(loss.total.isnan(), torch.nan, 0.0)
