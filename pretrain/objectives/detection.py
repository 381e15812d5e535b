"""What objectives have in common that ask of every token whether it was tampered with."""

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import nn

from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.detection_head import DetectionHead
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import LabelledView, Objective, TermLoss
from pretrain.objectives.losses import token_detection_loss


class DetectionConfig(Config):
    """Keys of an objective that tampers with some tokens."""

    rate: ScheduledFraction = Scheduled(start=0.15)
    """Expected fraction of tokens, or of gaps between them, that are tampered with."""
    discriminator_weight: float = Field(1.0, gt=0)
    """λ: factor on the loss."""

    @model_validator(mode="after")
    def _tampers(self):
        if max(self.rate.values()) == 0:
            raise ValueError("rate 0 leaves nothing to detect")
        return self


class TokenDetection(Objective):
    """Binary cross entropy at every token of a sample, special tokens too. The head is the objective's own.

    The tally ``NAME/positives`` counts the tokens with label 1, of all those that the term counts.
    """

    @property
    def terms(self) -> dict[str, float]:
        return {self.name: self.config.discriminator_weight}

    @property
    def fractions(self) -> dict[str, str]:
        return {f"{self.name}/positives": self.name}

    @property
    def heads(self) -> tuple[str, ...]:
        return (f"{self.name}_detection",)

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            raise UserError(
                f"objectives.{self.name}: '{encoder.config.model_type}' is a decoder; token detection needs an encoder"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {f"{self.name}_detection": DetectionHead.of(encoder.config)}

    def view(self, batch: Batch, labels: torch.Tensor, **tallies: torch.Tensor) -> LabelledView:
        """Return the view of a corrupted batch; ``tallies`` are counted beside the positives."""
        counted = {"positives": (labels == 1).sum(), **tallies}
        named = {f"{self.name}/{key}": count for key, count in counted.items()}
        return LabelledView(batch, batch.tokens, {self.name: batch.lengths}, named, labels)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        layout = Layout(view.batch, implementation=model.encoder.attention)
        return {self.name: self.detect(model, view, view.tokens, layout, weights)}

    def detect(self, model, view, tokens, layout, weights) -> TermLoss:
        """Return the loss on what the backbone reads, ``tokens``."""
        hidden, head = model.encoder(tokens, layout), model.heads[f"{self.name}_detection"]
        return token_detection_loss(head, hidden, view.labels, view.batch, weights, self.impl)[0]


def check_generator(objectives: Mapping[str, Objective], key: str, otherwise: str) -> None:
    """Raise :class:`UserError` on behalf of a recipe's ``key`` if none of its objectives trains a generator."""
    if not any("generator" in each.heads for each in objectives.values()):
        raise UserError(f"{key}: no objective of the recipe trains a generator; add rtd, or {otherwise}")
