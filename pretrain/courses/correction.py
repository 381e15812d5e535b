"""Self-correction (MCL, arXiv 2305.03981): generator and discriminator go over what they got wrong.

What happened in replaced token detection is the notebook: replacements that the discriminator missed (false negatives),
originals that it accused (false positives), and replacements that it caught (true positives), by which the generator
failed. The rules of the second round are ours, as those of the paper are not told in full: docs/mcl.md.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from fused_objectives.replacing import replace_tokens
from fused_objectives.targets import IGNORED
from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.objectives.base import Objective, TermLoss, View, register
from pretrain.objectives.losses import generator_loss, token_detection_loss
from pretrain.objectives.rtd import ReplacedTokenDetection

GENERATOR, DISCRIMINATOR = "correction/generator", "correction/discriminator"


class CorrectionConfig(Config):
    """Keys of ``objectives.correction``."""

    generator_weight: float = Field(1.0, ge=0)
    """Factor on the generator's second masked language modelling; 0: it only draws."""
    discriminator_weight: float = Field(50.0, gt=0)
    """λ: factor on the discriminator's second detection."""
    mistake_weight: float = Field(2.0, gt=0)
    """Factor on the losses of tokens that the discriminator was wrong about in the first round."""


@register
class SelfCorrection(Objective):
    """Generator: cross entropy at true positives, masked again. Discriminator: binary cross entropy at every token,
    where false negatives stand as they did and true positives are drawn anew.

    The first round is that of ``rtd`` on the same masks: taken over if the same step trains that too, else played again
    without gradient. Nothing of it has a gradient in either case.
    """

    name = "correction"
    Config = CorrectionConfig
    heads = ("detection", "generator")
    follows = True

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.first: ReplacedTokenDetection | None = None

    @property
    def terms(self) -> dict[str, float]:
        return {GENERATOR: self.config.generator_weight, DISCRIMINATOR: self.config.discriminator_weight}

    @property
    def fractions(self) -> dict[str, str]:
        return {"correction/positives": DISCRIMINATOR}

    @property
    def annotations(self) -> dict[str, str]:
        return self.first.annotations if self.first else {}

    def meet(self, others: Mapping[str, Objective]) -> None:
        self.first = others.get("rtd")
        if self.first is None or not self.first.generates:
            raise UserError(
                "objectives.correction: goes over what rtd's generator and discriminator did; add rtd with source "
                "generator"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {}  # they are rtd's

    def corrupt(self, batch: Batch, progress: float) -> View:
        view = self.first.corrupt(batch, progress)
        counts = zip((GENERATOR, DISCRIMINATOR), view.counts.values(), strict=True)
        return replace(view, counts=dict(counts), tallies={})

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        first = model.left.get(self.first.name)
        if first is None:
            with torch.no_grad():
                _, first = self.first.play(model, view)
        batch, layout = view.batch, Layout(view.batch, implementation=model.encoder.attention)
        caught = first.replaced & first.accused
        missed = first.replaced & ~first.accused
        wronged = batch.real & ~first.replaced & first.accused

        masked = torch.where(caught, self.vocabulary.mask_id, batch.tokens)
        again = replace(view, tokens=masked, labels=torch.where(caught, batch.tokens, IGNORED))
        relearnt, drawn = generator_loss(
            model.heads["generator"], again, layout, weights, seed=self.seed, stream="correction/sample", impl=self.impl
        )

        kept = torch.where(missed, first.tokens, batch.tokens)
        tokens = replace_tokens(kept, batch.segment_ids, *drawn, impl=self.impl).tokens
        positive = tokens != batch.tokens
        labels = torch.where(batch.real, positive.long(), IGNORED)
        stress = torch.where(missed | wronged, self.config.mistake_weight, 1.0)
        hidden, head = model.encoder(tokens, layout), model.heads["detection"]
        detected, _ = token_detection_loss(head, hidden, labels, batch, weights, self.impl, stress)

        counted = {"true_positives": caught, "false_negatives": missed, "false_positives": wronged}
        sizes = {
            f"{self.name}/{name}": TermLoss.counted(places, batch)
            for name, places in {**counted, "positives": positive & batch.real}.items()
        }
        return {GENERATOR: relearnt, DISCRIMINATOR: detected, **sizes}
