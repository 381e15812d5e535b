"""The Hugging Face model's own vocabulary head, with or without its logits."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import UserError
from pretrain.model.projection import Score, scored

_SMALL_VOCABULARY = 4096


class VocabularyHead(nn.Module):
    """Hidden states ``[..., hidden]`` → logits ``[..., vocabulary]``, or what a score makes of the head's last layer.

    In almost every family the last thing a head does is one linear layer, the projection. ESM adds a bias behind it:
    its logits are then scored through an identity matrix, which its 33 tokens make cheap.

    Raises:
        UserError: if a head with a large vocabulary goes on behind its projection.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        children = {name: child for name, child in model.named_children() if child is not model.base_model}
        if model.config.model_type == "distilbert":
            children = {
                name: children[name]
                for name in ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")
            }
        self.layers = nn.ModuleDict(children)
        self.hidden_size = model.config.hidden_size
        projection = model.get_output_embeddings()
        self.ends_in_projection = self._returns_what_it_gets_from(projection, self.hidden_size)
        if self.ends_in_projection:
            object.__setattr__(self, "projection", projection)  # it is among the layers already
        elif model.config.vocab_size > _SMALL_VOCABULARY:
            raise UserError(
                f"model.family: '{model.config.model_type}' changes its logits behind the projection of its head: "
                "unsupported"
            )

    def forward(self, hidden: torch.Tensor, score: Score | None = None) -> Any:
        if self.ends_in_projection:
            with scored(self.projection, score):
                return self._through(hidden)
        logits = self._through(hidden)
        identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return logits if score is None else score(logits, identity, None)

    def _through(self, hidden: torch.Tensor) -> Any:
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden

    @torch.no_grad()
    def _returns_what_it_gets_from(self, projection: nn.Module | None, width: int) -> bool:
        """Try whether a projection is there and nothing follows it."""
        if not isinstance(projection, nn.Linear):
            return False
        answer = (torch.empty(0),)
        parameter = projection.weight
        try:
            with scored(projection, lambda *_: answer):
                return self._through(parameter.new_zeros(1, width)) is answer
        except (AttributeError, RuntimeError, TypeError):  # what models raise that compute with the answer
            return False
