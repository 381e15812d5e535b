"""Gradient-disentangled embedding sharing (DeBERTaV3, arXiv 2111.09543, section 3.2.2): the discriminator builds on the
generator's token embeddings without pulling at them."""

import copy
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.errors import UserError

Model = TypeVar("Model", bound=PreTrainedModel)


class DisentangledEmbedding(nn.Module):
    """The discriminator's E_D = stop_gradient(E_G) + E_Δ, in the place of a backbone's token embedding.

    ``common``, E_G, is the generator's and no submodule here. It is called and never read, for whoever gathers its
    weights (ZeRO-3) does so for a call. ``delta``, E_Δ, begins with zeros.
    """

    def __init__(self, common: nn.Embedding):
        super().__init__()
        object.__setattr__(self, "common", common)
        self.delta = copy.deepcopy(common)  # with padding, and a scale if the family has one
        nn.init.zeros_(self.delta.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids ``[rows, length]`` → embeddings ``[rows, length, width]``."""
        with torch.no_grad():
            common = self.common(tokens)
        return common + self.delta(tokens)

    @torch.no_grad()
    def folded(self) -> nn.Embedding:
        """Return one embedding with the weights E_G + E_Δ, which share no memory with either."""
        embedding = copy.deepcopy(self.delta)
        embedding.weight += self.common.weight
        return embedding


def folded(model: Model) -> Model:
    """Return a Hugging Face model as it can be saved: with a plain token embedding in the place of a disentangled one.

    The weights must be whole. All others are shared with ``model``, which stays as it is; a vocabulary head that the
    config ties is tied to the new embedding.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, DisentangledEmbedding):
        return model
    weights = [*model.parameters(), *model.buffers(), *embedding.common.parameters()]
    twin = copy.deepcopy(model, {id(each): each for each in weights})
    twin.set_input_embeddings(embedding.folded())
    twin.tie_weights()
    return twin


def check_vocabulary_head(model: PreTrainedModel) -> None:
    """Raise :class:`UserError` if a vocabulary head that is to be trained is tied to a disentangled embedding, whose
    matrix E_G + E_Δ is nowhere."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, DisentangledEmbedding) and model.get_output_embeddings().weight is embedding.common.weight:
        raise UserError(
            "objectives.rtd.generator.embeddings: 'disentangled' leaves no matrix that a vocabulary head (mlm, clm) "
            "could be tied to; set it to shared or separate, or model.overrides.tie_word_embeddings to false"
        )
