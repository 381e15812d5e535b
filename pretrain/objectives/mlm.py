"""Masked language modelling (arXiv 1810.04805): recover the tokens that a masking policy hid."""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.policies import IGNORED, Masker, MaskingConfig
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import LabelledView, Objective, View, register


class MLMConfig(Config):
    """Keys of ``objectives.mlm``."""

    masking: MaskingConfig = MaskingConfig()


def target_losses(batch: Batch, labels: torch.Tensor, hidden: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Return each sample's sum of cross entropies over its targets, ``[S]`` float32; only target places meet the head.

    Args:
        labels: ``[rows, length]`` int64, IGNORED where there is no target.
        hidden: ``[rows, length, hidden]``.
        head: hidden states ``[n, hidden]`` → logits ``[n, vocabulary]``.
    """
    places = (labels != IGNORED).reshape(-1).nonzero().squeeze(1)
    logits = head(hidden.flatten(0, 1)[places])
    losses = F.cross_entropy(logits.float(), labels.reshape(-1)[places], reduction="none")
    return losses.new_zeros(len(batch.sample_ids)).index_add(0, batch.segment_ids.reshape(-1)[places], losses)


@register
class MaskedLanguageModelling(Objective):
    """Cross entropy of the original token at every chosen place."""

    name = "mlm"
    Config = MLMConfig
    heads = ("vocabulary",)

    def __init__(self, config, vocabulary, seed):
        super().__init__(config, vocabulary, seed)
        self.masker = Masker(config.masking, vocabulary, seed, stream=self.name)

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            raise UserError(
                f"objectives.mlm: '{encoder.config.model_type}' is a decoder, which sees no later token; use clm"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {"vocabulary": encoder.vocabulary_head()}

    def corrupt(self, batch: Batch, progress: float) -> View:
        tokens, labels = self.masker(batch, progress)
        counts = batch.sum_per_sample((labels != IGNORED).long())
        return LabelledView(batch, tokens, {self.name: counts}, labels)

    def loss(self, model, view) -> dict[str, torch.Tensor]:
        hidden = model.encoder(view.tokens, Layout(view.batch, implementation=model.encoder.attention))
        return {self.name: target_losses(view.batch, view.labels, hidden, model.heads["vocabulary"])}
