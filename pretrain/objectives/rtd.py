"""Replaced token detection (ELECTRA, arXiv 2003.10555): tell a generator's guesses from the original tokens."""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.activations import ACT2FN

from fused_objectives.detection import detection_loss
from fused_objectives.generator_sampling import linear_cross_entropy_and_sample
from fused_objectives.replacing import replace_tokens
from fused_objectives.targets import IGNORED, compact
from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.config import MaskingConfig, SplitConfig
from pretrain.masking.masker import Masker
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.generator import Generator
from pretrain.model.projection import Score, scored
from pretrain.objectives.base import LabelledView, Objective, TermLoss, View, register


class GeneratorConfig(Config):
    """Size of the generator."""

    depth: float = Field(0.5, gt=0, le=1)
    """Layers as a fraction of the backbone's."""
    width: float = Field(1.0, gt=0, le=1)
    """Hidden size as a fraction of the backbone's."""
    share_embeddings: bool = True
    """Generator and backbone have one token embedding; needs ``width: 1``."""

    @model_validator(mode="after")
    def _sharable(self):
        if self.share_embeddings and self.width != 1:
            raise ValueError("share_embeddings needs width 1, or set it to false")
        return self


class GeneratorSplitConfig(SplitConfig):
    """All chosen tokens become the mask token, unless the recipe says otherwise."""

    mask: ScheduledFraction = Scheduled(start=1.0)
    random: ScheduledFraction = Scheduled(start=0.0)


class GeneratorMaskingConfig(MaskingConfig):
    """Masking for the generator."""

    split: GeneratorSplitConfig = GeneratorSplitConfig()


class RTDConfig(Config):
    """Keys of ``objectives.rtd``."""

    masking: GeneratorMaskingConfig = GeneratorMaskingConfig()
    generator: GeneratorConfig = GeneratorConfig()
    discriminator_weight: float = Field(50.0, gt=0)
    """λ: weight of the discriminator's loss beside the generator's."""


class DetectionHead(nn.Module):
    """One logit a token, with the parameter names of transformers' ELECTRA discriminator."""

    def __init__(self, hidden_size: int, activation: str):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = ACT2FN[activation]
        self.dense_prediction = nn.Linear(hidden_size, 1)

    def forward(self, hidden: torch.Tensor, score: Score | None = None) -> Any:
        """Hidden states ``[..., hidden]`` → logits ``[..., 1]``, positive where replaced; or what ``score`` makes of
        the last layer."""
        with scored(self.dense_prediction, score):
            return self.dense_prediction(self.activation(self.dense(hidden)))


@register
class ReplacedTokenDetection(Objective):
    """Generator: cross entropy at masked places. Discriminator: binary cross entropy at every token of a sample."""

    name = "rtd"
    Config = RTDConfig
    heads = ("detection", "generator")

    def __init__(self, config, vocabulary, seed, impl="auto"):
        super().__init__(config, vocabulary, seed, impl)
        self.masker = Masker(config.masking, vocabulary, seed, stream=self.name, impl=impl)

    @property
    def terms(self) -> dict[str, float]:
        return {"rtd/generator": 1.0, "rtd/discriminator": self.config.discriminator_weight}

    @property
    def annotations(self) -> dict[str, str]:
        return self.masker.annotations

    def check(self, encoder: Encoder) -> None:
        if encoder.causal_only:
            raise UserError(
                f"objectives.rtd: '{encoder.config.model_type}' is a decoder; replaced token detection needs an encoder"
            )

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        config = encoder.config
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "gelu")
        generator = self.config.generator
        return {
            "detection": DetectionHead(config.hidden_size, activation),
            "generator": Generator(
                encoder, depth=generator.depth, width=generator.width, share_embeddings=generator.share_embeddings
            ),
        }

    def corrupt(self, batch: Batch, progress: float) -> View:
        tokens, labels, capacity, fallbacks = self.masker(batch, progress)
        counts = {"rtd/generator": batch.sum_per_sample((labels != IGNORED).long()), "rtd/discriminator": batch.lengths}
        tallies = {"rtd/masked_at_random": fallbacks} if self.annotations else {}
        return LabelledView(batch, tokens, counts, tallies, labels, capacity)

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        batch, encoder = view.batch, model.encoder
        layout = Layout(batch, implementation=encoder.attention)
        generator_loss, sampled = self._generate(model.heads["generator"], view, layout, weights)
        # A generator that hits the original leaves the label "original".
        replaced = replace_tokens(batch.tokens, batch.segment_ids, *sampled, impl=self.impl)
        hidden = encoder(replaced.tokens, layout)
        discriminator_loss = self._detect(model.heads["detection"], hidden, replaced.labels, batch, weights)
        return {"rtd/generator": generator_loss, "rtd/discriminator": discriminator_loss}

    def _generate(self, generator, view, layout, weights) -> tuple[TermLoss, tuple[torch.Tensor, torch.Tensor]]:
        """Return the generator's loss, and its samples: each place's slot among them (−1 where none), the tokens."""
        batch, labels = view.batch, view.labels.reshape(-1)
        targets = compact(labels != IGNORED, view.capacity)
        loss, tokens = generator(
            view.tokens,
            layout,
            targets,
            lambda features, weight, bias: linear_cross_entropy_and_sample(
                features,
                weight,
                targets.take(labels, padding=IGNORED),
                targets.take(batch.segment_ids.reshape(-1), padding=-1),
                len(batch.sample_ids),
                targets.take(batch.position_ids.reshape(-1)),
                batch.sample_ids,
                batch.visits,
                seed=self.seed,
                stream="rtd/sample",
                bias=bias,
                sample_weights=weights,
                impl=self.impl,
            ),
        )
        slots = targets.slots.view_as(batch.tokens)
        return TermLoss(loss.total + targets.overflow, loss.sums), (slots, tokens)

    def _detect(self, head, hidden, labels, batch, weights) -> TermLoss:
        places = compact(batch.real.reshape(-1))
        loss = head(
            places.take(hidden.flatten(0, 1)),
            lambda features, weight, bias: detection_loss(
                features,
                weight[0],
                places.take(labels.reshape(-1), padding=IGNORED),
                places.take(batch.segment_ids.reshape(-1), padding=-1),
                len(batch.sample_ids),
                bias=bias,
                sample_weights=weights,
                impl=self.impl,
            ),
        )
        return TermLoss(loss.total, loss.sums)
