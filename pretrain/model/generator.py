"""ELECTRA's generator: a smaller masked language model whose samples the discriminator has to tell from the
originals."""

import copy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from fused_objectives.targets import Targets
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.model.attention import Layout
from pretrain.model.disentangled import DisentangledEmbedding
from pretrain.model.encoder import Encoder
from pretrain.model.projection import Score


class GeneratorConfig(Config):
    """Size of the generator, what its embeddings have to do with the backbone's, and how boldly it is drawn from."""

    depth: float = Field(0.5, gt=0, le=1)
    """Layers as a fraction of the backbone's."""
    width: float = Field(1.0, gt=0, le=1)
    """Hidden and intermediate size and heads as a fraction of the backbone's (as in ELECTRA)."""
    embeddings: Literal["shared", "separate", "disentangled"] = "shared"
    """One token embedding for generator and backbone, one each, or the generator's with a part added that the backbone
    trains alone (arXiv 2111.09543). All but ``separate`` need ``width: 1``, or a family whose embeddings have a width
    of their own."""
    temperature: float = Field(1.0, gt=0)
    """What the logits are divided by before replacements are drawn."""


class Generator(nn.Module):
    """A masked language model of the backbone's family, a fraction as deep or as wide.

    With ``embeddings: disentangled`` it takes over the backbone's token embedding, and the backbone gets a
    :class:`DisentangledEmbedding` in its place.

    Args:
        encoder: the backbone, whose config is scaled.
        config: how.

    Raises:
        UserError: if the backbone's embeddings are to be used and do not fit.
    """

    def __init__(self, encoder: Encoder, config: GeneratorConfig):
        super().__init__()
        embedding = encoder.backbone.get_input_embeddings() if config.embeddings != "separate" else None
        scaled = _scaled(encoder.config, config, embedding)
        model = AutoModelForMaskedLM.from_config(scaled, dtype=torch.float32)
        if embedding is not None:
            _check_fit(model, embedding, config)
            model.set_input_embeddings(embedding)
            model.tie_weights()
        if config.embeddings == "disentangled":
            encoder.backbone.set_input_embeddings(DisentangledEmbedding(embedding))
        self.encoder = Encoder(
            model, attention=encoder.attention, activation_checkpointing=encoder.activation_checkpointing
        )
        self.head = self.encoder.vocabulary_head()
        self.temperature = config.temperature

    def forward(self, tokens: torch.Tensor, layout: Layout, targets: Targets, score: Score | None = None) -> Any:
        """Return the logits ``[K, vocabulary]`` at the target places of the flattened rows, or what ``score`` makes of
        the head's last layer."""
        return self.head(targets.take(self.encoder(tokens, layout).flatten(0, 1)), score)


def _scaled(config, scale: GeneratorConfig, embedding: nn.Embedding | None):
    """Return a copy of a Hugging Face config with its layers and widths scaled; head size stays as it is, and so does
    the width of an ``embedding`` that is to be used."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = max(1, round(config.num_hidden_layers * scale.depth))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if scale.width != 1:
        head_size = config.hidden_size // config.num_attention_heads
        config.num_attention_heads = max(1, round(config.num_attention_heads * scale.width))
        config.hidden_size = head_size * config.num_attention_heads
        inner = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
        setattr(config, inner, max(head_size, round(getattr(config, inner) * scale.width)))
        if hasattr(config, "embedding_size"):
            config.embedding_size = config.hidden_size if embedding is None else embedding.embedding_dim
    return config


def _check_fit(model: PreTrainedModel, embedding: nn.Module, config: GeneratorConfig) -> None:
    """Raise :class:`UserError` unless a model can take an embedding in the place of its own."""
    key, family = "objectives.rtd.generator.embeddings", model.config.model_type
    if not isinstance(embedding, nn.Embedding):
        raise UserError(f"{key}: the embeddings of '{family}' are no plain table; set it to separate")
    if model.get_input_embeddings().weight.shape != embedding.weight.shape:
        raise UserError(
            f"{key}: '{config.embeddings}' with width {config.width:g} needs a family whose embeddings have a width of "
            f"their own, such as electra or albert, which '{family}' has not; set it to separate, or scale by depth"
        )
