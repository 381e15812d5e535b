"""Aioli: estimate how each objective lowers each loss, in bursts, and mix accordingly (arXiv 2411.05735)."""

import math
from collections.abc import Mapping

from pydantic import Field

from pretrain.sampling.base import ProbingConfig, register
from pretrain.sampling.bursts import BurstSampler


class AioliConfig(ProbingConfig):
    """Keys of ``aioli``."""

    interval_steps: int = Field(200, ge=1)
    """Steps of a round."""
    explore: float = Field(0.25, gt=0, le=1)
    """Part of a round that is bursts."""
    learning_rate: float = Field(4.0, gt=0)
    """η."""


@register
class AioliSampler(BurstSampler):
    """Learns p_j ∝ p_j exp(η Σ_i A_ij), A_ij the drop of loss i a step of a burst on objective j.

    The rule and the rounds are the paper's; the columns' sums are shifted to be positive and scaled to sum to 1, so
    that one η fits all runs (its code does so on demand, entry by entry). Ours: drops are relative, and a round has one
    burst an objective.
    """

    name = "aioli"
    Config = AioliConfig

    def burst_steps(self) -> int:
        return math.floor(self.config.explore * self.config.interval_steps)

    def burst_shares(self) -> Mapping[str, float]:
        return dict.fromkeys(self.objectives, 1 / len(self.objectives))

    def conclude(self, window: int, credits: dict[str, float]) -> dict[str, dict[str, float]]:
        lowest = min(credits.values(), default=0.0)
        columns = {name: credit - min(lowest, 0.0) for name, credit in credits.items()}
        total = math.fsum(columns.values())
        if len(columns) == len(self.objectives) and total > 0:
            for name, column in columns.items():
                self.logits[name] += self.config.learning_rate * column / total
        return {"credits": credits}
