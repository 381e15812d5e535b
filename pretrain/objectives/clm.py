"""Causal language modelling: predict each token from those before it, in the same sample."""

import torch
from torch import nn

from fused_objectives.targets import IGNORED
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import LabelledView, Objective, TermLoss, View, register
from pretrain.objectives.losses import vocabulary_loss


class CLMConfig(Config):
    """Keys of ``objectives.clm``: none."""


@register
class CausalLanguageModelling(Objective):
    """Cross entropy of the next token. On an encoder the attention of this objective alone is causal."""

    name = "clm"
    Config = CLMConfig
    heads = ("vocabulary",)

    def check(self, encoder: Encoder) -> None:
        if not encoder.causal_only and not encoder.packs_rows:
            raise UserError(f"objectives.clm: the attention of '{encoder.config.model_type}' cannot be made causal")

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {"vocabulary": encoder.vocabulary_head()}

    def corrupt(self, batch: Batch, progress: float) -> View:
        labels = torch.full_like(batch.tokens, IGNORED)
        same_sample = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & batch.real[:, 1:]
        labels[:, :-1] = torch.where(same_sample, batch.tokens[:, 1:], IGNORED)
        return LabelledView(batch, batch.tokens, {self.name: (batch.lengths - 1).clamp(min=0)}, {}, labels)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        layout = Layout(view.batch, causal=True, implementation=model.encoder.attention)
        hidden = model.encoder(view.tokens, layout)
        return {self.name: vocabulary_loss(model.heads["vocabulary"], hidden, view, weights, self.impl)}
