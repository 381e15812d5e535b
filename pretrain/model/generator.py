"""ELECTRA's generator: a smaller masked language model whose samples the discriminator has to tell from the
originals."""

import copy
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import AutoModelForMaskedLM

from fused_objectives.targets import Targets
from pretrain.config import Config
from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder
from pretrain.model.projection import Score


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


class Generator(nn.Module):
    """A masked language model of the backbone's family, a fraction as deep or as wide.

    Args:
        encoder: the backbone, whose config is scaled.
        depth: layers, as a fraction of the backbone's.
        width: hidden and intermediate size and heads, as a fraction of the backbone's.
        share_embeddings: use the backbone's token embeddings (the widths must then be equal).
    """

    def __init__(self, encoder: Encoder, *, depth: float, width: float, share_embeddings: bool):
        super().__init__()
        model = AutoModelForMaskedLM.from_config(_scaled(encoder.config, depth, width), dtype=torch.float32)
        if share_embeddings:
            model.set_input_embeddings(encoder.backbone.get_input_embeddings())
            model.tie_weights()
        self.encoder = Encoder(
            model, attention=encoder.attention, activation_checkpointing=encoder.activation_checkpointing
        )
        self.head = self.encoder.vocabulary_head()

    def forward(self, tokens: torch.Tensor, layout: Layout, targets: Targets, score: Score | None = None) -> Any:
        """Return the logits ``[K, vocabulary]`` at the target places of the flattened rows, or what ``score`` makes of
        the head's last layer."""
        return self.head(targets.take(self.encoder(tokens, layout).flatten(0, 1)), score)


def _scaled(config, depth: float, width: float):
    """Return a copy of a Hugging Face config with its layers and widths scaled; head size stays as it is."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = max(1, round(config.num_hidden_layers * depth))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if width != 1:
        head_size = config.hidden_size // config.num_attention_heads
        config.num_attention_heads = max(1, round(config.num_attention_heads * width))
        config.hidden_size = head_size * config.num_attention_heads
        inner = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
        setattr(config, inner, max(head_size, round(getattr(config, inner) * width)))
        if hasattr(config, "embedding_size"):
            config.embedding_size = config.hidden_size
    return config
