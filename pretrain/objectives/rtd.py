"""Replaced token detection (ELECTRA, arXiv 2003.10555): tell a generator's guesses from the original tokens."""

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from fused_objectives.replacing import replace_tokens
from fused_objectives.targets import IGNORED
from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig, SplitConfig
from pretrain.masking.masker import Chooser, Masker
from pretrain.model.attention import Layout
from pretrain.model.detection_head import DetectionHead
from pretrain.model.encoder import Encoder
from pretrain.model.generator import Generator, GeneratorConfig
from pretrain.objectives.base import LabelledView, Objective, TermLoss, View, register
from pretrain.objectives.losses import generator_loss, token_detection_loss
from pretrain.objectives.unigram import draw_unigram

_DISCRIMINATOR_WEIGHT = 50.0


class GeneratorSplitConfig(SplitConfig):
    """All chosen tokens become the mask token, unless the recipe says otherwise."""

    mask: ScheduledFraction = Scheduled(start=1.0)
    random: ScheduledFraction = Scheduled(start=0.0)


class GeneratorMaskingConfig(MaskingConfig):
    """Masking for the generator."""

    split: GeneratorSplitConfig = GeneratorSplitConfig()


class RTDConfig(Config):
    """Keys of ``objectives.rtd``."""

    source: Literal["generator", "unigram"] = "generator"
    """Where replacements come from: a generator that is trained along, or the distribution of tokens in the corpus."""
    masking: GeneratorMaskingConfig = GeneratorMaskingConfig()
    generator: GeneratorConfig = GeneratorConfig()
    discriminator_weight: float = Field(_DISCRIMINATOR_WEIGHT, gt=0)
    """λ: weight of the discriminator's loss beside the generator's."""

    @model_validator(mode="after")
    def _nothing_for_a_generator_that_is_not_there(self):
        given = {
            "masking.split": self.masking.split != GeneratorSplitConfig(),
            "generator": self.generator != GeneratorConfig(),
            "discriminator_weight": self.discriminator_weight != _DISCRIMINATOR_WEIGHT,
        }
        if self.source == "unigram" and any(given.values()):
            wrong = next(key for key in given if given[key])
            raise ValueError(f"'{wrong}' goes with source generator, not with unigram")
        return self


class Round(NamedTuple):
    """What generator and discriminator did with a micro-batch, ``[rows, length]`` each."""

    tokens: torch.Tensor
    """int64: what the discriminator read."""
    replaced: torch.Tensor
    """bool: where that is not the original."""
    accused: torch.Tensor
    """bool: where the discriminator said so."""


@register
class ReplacedTokenDetection(Objective):
    """Generator: cross entropy at masked places. Discriminator: binary cross entropy at every token of a sample.

    With replacements from the corpus' distribution of tokens there is no generator, and no loss of it.
    """

    name = "rtd"
    Config = RTDConfig

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.generates = config.source == "generator"
        chooser = Masker if self.generates else Chooser  # without a generator nothing reads a mask token
        self.masker = chooser(config.masking, vocabulary, seed, stream=self.name, impl=impl)

    @property
    def heads(self) -> tuple[str, ...]:
        return ("detection", "generator") if self.generates else ("detection",)

    @property
    def terms(self) -> dict[str, float]:
        if not self.generates:
            return {"rtd/discriminator": 1.0}
        return {"rtd/generator": 1.0, "rtd/discriminator": self.config.discriminator_weight}

    @property
    def fractions(self) -> dict[str, str]:
        return {"rtd/positives": "rtd/discriminator"}

    @property
    def annotations(self) -> dict[str, str]:
        return self.masker.annotations

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            raise UserError(
                f"objectives.rtd: '{encoder.config.model_type}' is a decoder; replaced token detection needs an encoder"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {"detection": DetectionHead.of(encoder.config)}
        if self.generates:
            heads["generator"] = Generator(encoder, self.config.generator)
        return heads

    def corrupt(self, batch: Batch, progress: float) -> View:
        if not self.generates:
            return self._replace(batch, progress)
        tokens, labels, capacity, fallbacks = self.masker(batch, progress)
        targets = batch.sum_per_sample((labels != IGNORED).long())
        counts = {"rtd/generator": targets, "rtd/discriminator": batch.lengths}
        return LabelledView(batch, tokens, counts, self._fallbacks(fallbacks), labels, capacity)

    def _replace(self, batch: Batch, progress: float) -> View:
        """Return the view in which the tokens are replaced already, labelled as the discriminator shall."""
        chosen, _, fallbacks = self.masker.choose(batch, progress)
        drawn = draw_unigram(batch, self.vocabulary, self.seed, "rtd/unigram")
        tokens = torch.where(chosen, drawn, batch.tokens)
        labels = torch.where(batch.real, (tokens != batch.tokens).long(), IGNORED)
        tallies = self._fallbacks(fallbacks) | {"rtd/positives": (labels == 1).sum()}
        return LabelledView(batch, tokens, {"rtd/discriminator": batch.lengths}, tallies, labels)

    def _fallbacks(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"rtd/masked_at_random": samples} if self.annotations else {}

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        losses, model.left[self.name] = self.play(model, view, weights)
        return losses

    def play(self, model, view, weights=None) -> tuple[dict[str, TermLoss], Round]:
        """Return what :meth:`loss` does, and what generator and discriminator did."""
        batch, encoder, losses = view.batch, model.encoder, {}
        layout = Layout(batch, implementation=encoder.attention)
        tokens, labels = view.tokens, view.labels
        if self.generates:
            losses["rtd/generator"], drawn = generator_loss(
                model.heads["generator"], view, layout, weights, seed=self.seed, stream="rtd/sample", impl=self.impl
            )
            # A generator that hits the original leaves the label "original".
            tokens, labels = replace_tokens(batch.tokens, batch.segment_ids, *drawn, impl=self.impl)
            losses["rtd/positives"] = TermLoss.counted(labels == 1, batch)
        hidden, head = encoder(tokens, layout), model.heads["detection"]
        detected = token_detection_loss(head, hidden, labels, batch, weights, self.impl)
        losses["rtd/discriminator"], accused = detected
        return losses, Round(tokens, labels == 1, accused)
