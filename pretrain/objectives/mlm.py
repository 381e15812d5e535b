"""Masked language modelling (arXiv 1810.04805): recover the tokens that a masking policy hid."""

from torch import nn

from fused_objectives.targets import IGNORED
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig
from pretrain.masking.masker import Masker
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import LabelledView, Objective, TermLoss, View, register
from pretrain.objectives.losses import vocabulary_loss


class MLMConfig(Config):
    """Keys of ``objectives.mlm``."""

    masking: MaskingConfig = MaskingConfig()


@register
class MaskedLanguageModelling(Objective):
    """Cross entropy of the original token at every chosen place."""

    name = "mlm"
    Config = MLMConfig
    heads = ("vocabulary",)

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.masker = Masker(config.masking, vocabulary, seed, stream=self.name, impl=impl)

    @property
    def annotations(self) -> dict[str, str]:
        return self.masker.annotations

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            family = encoder.config.model_type
            raise UserError(f"objectives.{self.name}: '{family}' is a decoder, which sees no later token; use clm")

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {"vocabulary": encoder.vocabulary_head()}

    def corrupt(self, batch: Batch, progress: float) -> View:
        tokens, labels, capacity, fallbacks = self.masker(batch, progress)
        counts = batch.sum_per_sample((labels != IGNORED).long())
        tallies = {f"{self.name}/masked_at_random": fallbacks} if self.annotations else {}
        return LabelledView(batch, tokens, {self.name: counts}, tallies, labels, capacity)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        hidden = model.encoder(view.tokens, Layout(view.batch, implementation=model.encoder.attention))
        return {self.name: vocabulary_loss(model.heads["vocabulary"], hidden, view, weights, self.impl)}
