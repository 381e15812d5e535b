"""ELECTRA's generator: a smaller masked language model whose samples the discriminator has to tell from the
originals."""

import copy

import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from pretrain.model.attention import Layout
from pretrain.model.encoder import Encoder


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

    def forward(self, tokens: torch.Tensor, layout: Layout, places: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[n, vocabulary]`` at ``places [n]`` of the flattened rows."""
        return self.head(self.encoder(tokens, layout).flatten(0, 1)[places])


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


def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from ``softmax(logits [n, vocabulary])`` by inverting its cumulative sum at ``uniform
    [n]`` in [0, 1).

    One random number a place instead of one a vocabulary entry keeps the draw a function of (seed, sample, visit,
    position). Returns ``[n]`` int64; a token of probability zero is never among them.
    """
    cumulative = logits.detach().float().softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may lift the threshold to the total, past the last token that has a probability.
    threshold = torch.minimum(uniform.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    return drawn.clamp(max=logits.shape[-1] - 1)  # logits that are not finite must not become an index out of range
