"""Span corruption (T5, arXiv 1910.10683, section 3.1.4): write the spans that sentinels stand for."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fused_objectives.targets import IGNORED
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import ChoiceConfig, SpanConfig
from pretrain.masking.masker import Chooser
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.objectives.base import Objective, TermLoss, View, register
from pretrain.objectives.spans import (
    PairView,
    Piece,
    Spans,
    find_spans,
    lay_out,
    pair_loss,
    running_count,
    source,
    whole_samples,
    width_for,
)


class ThreeTokenSpans(SpanConfig):
    """At a rate of 0.15 the runs of chosen tokens, in which spans may meet, have 3 tokens on average."""

    stop: float = Field(0.367, gt=0, le=1)
    longest: int = Field(16, ge=1, le=64)
    whole_words: bool = False


class SpanChoiceConfig(ChoiceConfig):
    """What is taken out: T5's spans, unless the recipe says otherwise."""

    policy: Literal["random", "whole_word", "span", "salient", "frequency", "pos_weighted", "learned"] = "span"
    span: ThreeTokenSpans = ThreeTokenSpans()


class SpanCorruptionConfig(Config):
    """Keys of ``objectives.span_corruption``."""

    masking: SpanChoiceConfig = SpanChoiceConfig()
    output: Literal["spans", "sentence"] = "spans"
    """What is written: sentinels and spans, or the whole sample."""
    target_length: int | None = Field(None, ge=4)
    """The most places of a target with ``spans``; spans that do not fit stay in the text. None: as many as needed."""


@register
class SpanCorruption(Objective):
    """Cross entropy of the target's tokens: ``<extra_id_0> span <extra_id_1> span … <extra_id_n> end``."""

    name = "span_corruption"
    Config = SpanCorruptionConfig
    heads = ("vocabulary",)
    paired = True

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        sentinels, least = len(vocabulary.sentinel_ids), 2 if config.output == "spans" else 1
        if sentinels < least:
            has = f"only {sentinels} of the sentinels" if sentinels else "no sentinels"
            raise UserError(
                f"objectives.span_corruption: the store's tokenizer has {has} <extra_id_0>, <extra_id_1>, …; "
                "prepare the store with 'medley prepare --sentinels 100' or with T5's tokenizer"
            )
        if config.output == "spans" and vocabulary.eos_id is None:
            raise UserError(
                "objectives.span_corruption: the store's tokenizer has no end token to close a target with; "
                "prepare the store with one that does, or set output to sentence"
            )
        self.most = sentinels - 1 if config.output == "spans" else sentinels  # the last closes the last span
        self.target_length = config.target_length
        self.chooser = Chooser(config.masking, vocabulary, seed, stream=self.name, impl=impl)

    @property
    def annotations(self) -> dict[str, str]:
        return self.chooser.annotations

    def check(self, encoder: EncoderDecoder) -> None:
        if encoder.positions is None:
            return
        if (self.config.target_length or 0) > encoder.positions:
            raise UserError(
                f"objectives.span_corruption.target_length: {self.config.target_length} is more than the "
                f"{encoder.positions} positions of the model; set it to {encoder.positions} or less"
            )
        self.target_length = self.config.target_length or encoder.positions

    def build_heads(self, encoder: EncoderDecoder) -> dict[str, nn.Module]:
        return {"vocabulary": encoder.vocabulary_head()}

    def corrupt(self, batch: Batch, progress: float) -> View:
        chosen, capacity, fallbacks = self.chooser.choose(batch, progress)
        writes_spans = self.config.output == "spans"
        room = self.target_length - 2 if writes_spans and self.target_length is not None else None
        spans = find_spans(batch, chosen, self.most, room)
        sentinels = self.vocabulary.tables(batch.tokens.device).sentinel_ids
        marks = sentinels[spans.number.clamp(0, len(sentinels) - 1)]
        counts = batch.sum_per_sample(spans.first.long())
        if writes_spans:
            labels, lengths = self._spans(batch, spans, marks, counts, sentinels)
        else:
            labels, lengths = whole_samples(batch, counts > 0)
        if capacity is not None:  # every chosen token and at most one sentinel each, a last sentinel and the end
            capacity = min(2 * (capacity + len(counts)), labels.numel()) if writes_spans else None
        tallies = {f"{self.name}/spans_left": spans.left}
        if self.annotations:
            tallies[f"{self.name}/chosen_at_random"] = fallbacks
        tokens, real = source(batch, spans, marks, self.vocabulary.pad_id)
        return PairView(batch, tokens, {self.name: lengths}, tallies, real, labels, capacity)

    def _spans(self, batch: Batch, spans: Spans, marks, counts, sentinels) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the targets of sentinels and spans, ``[S, target length]`` int64, and their lengths."""
        ends = batch.sum_per_sample(spans.inside.long()) + counts
        lengths = torch.where(counts > 0, ends + 2, 0)
        bound = batch.tokens.shape[1] + 3  # runs do not touch, so n tokens give n + 1 with their sentinels at most
        width = width_for(lengths, bound if self.target_length is None else min(bound, self.target_length))
        column = running_count(batch, spans.inside) + spans.number  # of a token; its span's sentinel stands before it
        owners, there = torch.arange(len(counts), device=counts.device), counts > 0
        pieces = (
            Piece(spans.first, batch.segment_ids, column - 1, marks),
            Piece(spans.inside, batch.segment_ids, column, batch.tokens),
            Piece(there, owners, ends, sentinels[counts]),
            Piece(there, owners, ends + 1, torch.full_like(ends, self.vocabulary.eos_id)),
        )
        return lay_out(batch, width, IGNORED, *pieces), lengths

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        return {self.name: pair_loss(model, view, weights, self.impl)}
