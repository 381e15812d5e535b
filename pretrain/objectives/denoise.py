"""Denoising by text infilling (BART, arXiv 1910.13461, section 2.2): spans are hidden, and the whole sample written."""

from typing import Literal

from pydantic import Field
from torch import nn

from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import ChoiceConfig, SpanConfig
from pretrain.masking.masker import Chooser
from pretrain.model.encoder_decoder import EncoderDecoder
from pretrain.objectives.base import Objective, TermLoss, View, register
from pretrain.objectives.spans import PairView, find_spans, pair_loss, source, whole_samples


class InfilledSpans(SpanConfig):
    """At a rate of 0.3 the runs of chosen tokens, in which spans may meet, have 3 tokens on average."""

    stop: float = Field(0.42, gt=0, le=1)
    longest: int = Field(16, ge=1, le=64)
    whole_words: bool = False


class InfillingConfig(ChoiceConfig):
    """What is hidden: as much as in the paper, unless the recipe says otherwise."""

    policy: Literal["random", "whole_word", "span", "salient", "frequency", "pos_weighted", "learned"] = "span"
    rate: ScheduledFraction = Scheduled(start=0.3)
    span: InfilledSpans = InfilledSpans()


class DenoiseConfig(Config):
    """Keys of ``objectives.denoise``."""

    masking: InfillingConfig = InfillingConfig()


@register
class Denoising(Objective):
    """Cross entropy of every token of the sample; in the source each span is one mask token, however long."""

    name = "denoise"
    Config = DenoiseConfig
    heads = ("vocabulary",)
    paired = True

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        if vocabulary.mask_id is None:
            raise UserError(
                "objectives.denoise: the store's tokenizer has no mask token; prepare the store with one that does, "
                "or use span_corruption with output: sentence"
            )
        self.chooser = Chooser(config.masking, vocabulary, seed, stream=self.name, impl=impl)

    @property
    def annotations(self) -> dict[str, str]:
        return self.chooser.annotations

    def build_heads(self, encoder: EncoderDecoder) -> dict[str, nn.Module]:
        return {"vocabulary": encoder.vocabulary_head()}

    def corrupt(self, batch: Batch, progress: float) -> View:
        chosen, _, fallbacks = self.chooser.choose(batch, progress)
        spans = find_spans(batch, chosen)
        marks = batch.tokens.new_full((), self.vocabulary.mask_id)
        tokens, real = source(batch, spans, marks, self.vocabulary.pad_id)
        text = self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real
        labels, lengths = whole_samples(batch, batch.sum_per_sample(text.long()) > 0)
        tallies = {f"{self.name}/chosen_at_random": fallbacks} if self.annotations else {}
        return PairView(batch, tokens, {self.name: lengths}, tallies, real, labels)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        return {self.name: pair_loss(model, view, weights, self.impl)}
