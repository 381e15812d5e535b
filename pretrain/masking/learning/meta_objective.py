"""The parts of a meta step that the engine trains: the policy by its masks' credit, and the end task's head."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from pretrain.config import Config
from pretrain.data.batch import Batch
from pretrain.masking.learning.policy import PolicyNetwork, build_policy
from pretrain.masking.learning.relaxed import RelaxedMask, gumbel_noise, relaxed_top_k
from pretrain.model.encoder import Encoder, ModelConfig
from pretrain.model.vocabulary import Vocabulary
from pretrain.objectives.base import Objective, TermLoss, View
from pretrain.objectives.end_task import EndTask


class PolicyConfig(Config):
    """Keys of ``policy``: the network that scores tokens, and how it learns."""

    model: ModelConfig = ModelConfig(size="tiny")
    """The encoder that it reads with; its dropout is 0."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak, with the schedule of ``training``."""
    temperature: float = Field(1.0, gt=0)
    """Of the relaxed mask, whose gradient it gets: the lower, the closer to the mask itself, and the noisier."""
    credit: Literal["hidden", "all"] = "hidden"
    """What a token is credited with: ``hidden``, if it is hidden, what its loss does in the step; or ``all``, the whole
    derivative by the mask, as the straight-through estimator has it, of visible tokens too."""


@dataclass(frozen=True)
class CreditedView(View):
    """A batch, untouched, and what the end task gains by each token's being hidden."""

    rate: float
    """Share of a sample's text that is hidden."""
    credit: torch.Tensor
    """``[rows, length]`` float32: of the derivative of ⟨∇L_task, ∇L_mlm⟩ by the mask, what counts."""


class PolicyLearning(Objective):
    """−Σ credit × relaxed mask: its gradient is that of the end task's loss after the step, up to the step's length.

    The length α of the step is left out: AdamW's updates do not depend on it.
    """

    name = "policy"
    Config = PolicyConfig
    heads = ("policy",)

    def __init__(self, config: PolicyConfig, vocabulary: Vocabulary, seed: int, max_length: int):
        super().__init__(config, vocabulary, seed)
        self.max_length = max_length

    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        return {self.name: build_policy(self.config.model, self.vocabulary, self.max_length)}

    def eligible(self, batch: Batch) -> torch.Tensor:
        """Return which places may be hidden, ``[rows, length]`` bool: text."""
        return self.vocabulary.tables(batch.tokens.device).is_ordinary[batch.tokens] & batch.real

    def relaxed(self, network: PolicyNetwork, batch: Batch, rate: float) -> RelaxedMask:
        """Draw the policy's masks of a batch; the same for the same (seed, sample, visit) and weights."""
        scores = network(batch) + gumbel_noise(batch, self.seed, self.name)
        return relaxed_top_k(scores, self.eligible(batch), batch, rate, self.config.temperature)

    def corrupt(self, batch: Batch, progress: float) -> CreditedView:
        text = self.eligible(batch)
        counts = {self.name: batch.sum_per_sample(text.long())}
        return CreditedView(batch, batch.tokens, counts, {}, 0.0, torch.zeros_like(text, dtype=torch.float32))

    def loss(self, model, view, weights=None) -> dict[str, TermLoss]:
        soft = self.relaxed(model.heads[self.name], view.batch, view.rate).soft
        sums = view.batch.sum_per_sample(-view.credit * soft)
        return {self.name: TermLoss((sums if weights is None else sums * weights).sum(), sums.detach())}


class HeadOnly(EndTask):
    """An end task whose loss trains its head alone: the backbone is left to masked language modelling."""

    def __init__(self, task: EndTask):
        vars(self).update(vars(task))
        self.of_backbone = task
        """The same task, whose loss reaches the backbone."""

    def features(self, encoder, drawn):
        with torch.no_grad():
            return super().features(encoder, drawn)
