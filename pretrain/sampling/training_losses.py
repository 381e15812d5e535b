"""Samplers that go by the training losses alone and measure nothing."""

import math
from collections.abc import Mapping

from pydantic import Field

from pretrain.sampling.base import SamplerConfig, register
from pretrain.sampling.learning import LearningSampler, softmax


class LossProportionalConfig(SamplerConfig):
    """Keys of ``loss_proportional``."""

    decay: float = Field(0.99, ge=0, lt=1)
    """Of an objective's moving average of losses, a step that trains it."""


class OdmConfig(SamplerConfig):
    """Keys of ``odm``."""

    decay: float = Field(0.9, ge=0, lt=1)
    """Of an objective's moving average of rewards, a step that trains it (α)."""


class _AverageSampler(LearningSampler):
    """Keeps objective → moving average of what its training losses say."""

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self.averages: dict[str, float] = {}


@register
class LossProportionalSampler(_AverageSampler):
    """Probabilities in proportion to the moving averages of the training losses.

    An objective that was not trained yet counts as the one with the largest loss. Losses below 0 count as 0.
    """

    name = "loss_proportional"
    Config = LossProportionalConfig
    learned = ("averages",)

    def probabilities(self, step: int) -> dict[str, float]:
        largest = max(self.averages.values(), default=0.0)
        if largest <= 0:
            return dict.fromkeys(self.objectives, 1 / len(self.objectives))
        heights = {name: max(self.averages.get(name, largest), 0.0) for name in self.objectives}
        total = math.fsum(heights.values())
        return {name: height / total for name, height in heights.items()}

    def observe(self, step: int, plan: Mapping[str, float], losses: Mapping[str, float]) -> None:
        for name, loss in losses.items():
            if self.finite({name: loss}):
                before = self.averages.get(name, loss)
                self.averages[name] = self.config.decay * before + (1 - self.config.decay) * loss


@register
class OdmSampler(_AverageSampler):
    """Exp3 with the training loss as reward (ODM, arXiv 2312.02406).

    R_i ← α R_i + (1 − α) L_i / p_i of the objectives i just trained, ε_t = min(1/m, √(ln m / (m t))) and
    p = (1 − m ε_t) softmax(ε_{t−1} R) + ε_t after t − 1 steps. Formulas as the paper has them; ours are the value of α,
    and that with ``mix``, where every loss is seen in every step, nothing is divided by p.
    """

    name = "odm"
    Config = OdmConfig
    learned = ("averages", "seen")

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self.averages = dict.fromkeys(self.objectives, 0.0)
        self.seen = 0

    def probabilities(self, step: int) -> dict[str, float]:
        exploration, before = self._exploration(self.seen + 1), self._exploration(max(self.seen, 1))
        return softmax({name: before * reward for name, reward in self.averages.items()}, exploration)

    def _exploration(self, step: int) -> float:
        m = len(self.objectives)
        return min(1 / m, math.sqrt(math.log(m) / (m * step)))

    def observe(self, step: int, plan: Mapping[str, float], losses: Mapping[str, float]) -> None:
        chance = dict.fromkeys(losses, 1.0) if self.mixes else self.probabilities(step)
        self.seen += 1
        for name, loss in losses.items():
            if self.finite({name: loss}):
                reward = loss / chance[name]
                self.averages[name] = self.config.decay * self.averages[name] + (1 - self.config.decay) * reward
