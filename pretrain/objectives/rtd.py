"""Replaced token detection (ELECTRA, arXiv 2003.10555): tell a generator's guesses from the original tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from transformers.activations import ACT2FN

from fused_objectives.philox import uniform
from pretrain.config import Config, Scheduled, ScheduledFraction
from pretrain.data.batch import Batch
from pretrain.errors import UserError
from pretrain.masking.policies import IGNORED, Masker, MaskingConfig, SplitConfig
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.generator import Generator, sample_tokens
from pretrain.objectives.base import LabelledView, Objective, View, register


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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., hidden]`` → logits ``[...]``; positive means replaced."""
        return self.dense_prediction(self.activation(self.dense(hidden))).squeeze(-1)


@dataclass(frozen=True)
class ReplacementView(LabelledView):
    """Masked tokens for the generator, and the noise that its samples are drawn with."""

    noise: torch.Tensor
    """``[rows, length]`` float64 in [0, 1)."""


@register
class ReplacedTokenDetection(Objective):
    """Generator: cross entropy at masked places. Discriminator: binary cross entropy at every token of a sample."""

    name = "rtd"
    Config = RTDConfig
    heads = ("detection", "generator")

    def __init__(self, config, vocabulary, seed):
        super().__init__(config, vocabulary, seed)
        self.masker = Masker(config.masking, vocabulary, seed, stream=self.name)

    @property
    def terms(self) -> dict[str, float]:
        return {"rtd/generator": 1.0, "rtd/discriminator": self.config.discriminator_weight}

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
        tokens, labels = self.masker(batch, progress)
        counts = {"rtd/generator": batch.sum_per_sample((labels != IGNORED).long()), "rtd/discriminator": batch.lengths}
        noise = uniform(batch.random_words(self.seed, "rtd/sample")[0])
        return ReplacementView(batch, tokens, counts, labels, noise)

    def loss(self, model, view) -> dict[str, torch.Tensor]:
        batch, encoder = view.batch, model.encoder
        segments = batch.segment_ids.reshape(-1)
        layout = Layout(batch, implementation=encoder.attention)
        zeros = torch.zeros(len(batch.sample_ids), device=view.tokens.device)

        masked = (view.labels != IGNORED).reshape(-1).nonzero().squeeze(1)
        logits = model.heads["generator"](view.tokens, layout, masked)
        losses = F.cross_entropy(logits.float(), view.labels.reshape(-1)[masked], reduction="none")
        generator_sums = zeros.index_add(0, segments[masked], losses)

        replaced = batch.tokens.reshape(-1).clone()
        replaced[masked] = sample_tokens(logits, view.noise.reshape(-1)[masked])
        is_replaced = (replaced != batch.tokens.reshape(-1)).float()  # a generator that hits the original: "original"
        hidden = encoder(replaced.view_as(batch.tokens), layout)
        places = batch.real.reshape(-1).nonzero().squeeze(1)
        detection = model.heads["detection"](hidden.flatten(0, 1)[places])
        losses = F.binary_cross_entropy_with_logits(detection.float(), is_replaced[places], reduction="none")
        return {"rtd/generator": generator_sums, "rtd/discriminator": zeros.index_add(0, segments[places], losses)}
