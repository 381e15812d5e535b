"""The head that says of a token whether it was tampered with."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from pretrain.model.projection import Score, scored


class DetectionHead(nn.Module):
    """One logit a token, with the parameter names of transformers' ELECTRA discriminator."""

    def __init__(self, hidden_size: int, activation: str):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.activation = ACT2FN[activation]
        self.dense_prediction = nn.Linear(hidden_size, 1)

    @classmethod
    def of(cls, config) -> "DetectionHead":
        """Build one for a backbone of this Hugging Face config."""
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", "gelu")
        return cls(config.hidden_size, activation)

    def forward(self, hidden: torch.Tensor, score: Score | None = None) -> Any:
        """Hidden states ``[..., hidden]`` → logits ``[..., 1]``, positive where tampered with; or what ``score`` makes
        of the last layer."""
        with scored(self.dense_prediction, score):
            return self.dense_prediction(self.activation(self.dense(hidden)))
