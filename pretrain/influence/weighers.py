"""Weighers that need no gradients: all alike, by the loss, and LinUpper."""

from typing import Any

import numpy as np

from pretrain.config import Scheduled, ScheduledNumber
from pretrain.influence.base import Measures, TemperedConfig, Weigher, WeigherConfig, register
from pretrain.influence.weights import linupper, softmax_weights, standardised


@register
class UniformWeigher(Weigher):
    """All samples count 1."""

    name = "uniform"
    Config = WeigherConfig
    measures = "nothing"

    def temperature(self, step: int) -> float:
        return 0.0

    def scores(self, measures: Measures) -> np.ndarray:
        return np.zeros(len(measures.targets))

    def _weigh(self, step: int, objective: str, scores: np.ndarray, samples: int) -> np.ndarray:
        return np.ones(len(scores))

    def told(self, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LossConfig(TemperedConfig):
    """Keys of ``loss``."""

    temperature: ScheduledNumber = Scheduled(start=1.0)


@register
class LossWeigher(Weigher):
    """Weighs by the loss as PRESENCE does by self-influence: w = softmax(τ · z), z the standardised loss."""

    name = "loss"
    Config = LossConfig
    measures = "losses"

    def scores(self, measures: Measures) -> np.ndarray:
        return measures.losses

    def _weigh(self, step: int, objective: str, scores: np.ndarray, samples: int) -> np.ndarray:
        return softmax_weights(self.temperature(step) * standardised(scores))


class LinUpperConfig(TemperedConfig):
    """Keys of ``linupper``."""

    temperature: ScheduledNumber = Scheduled(schedule="steps", start=0.0, steps={0.05: 1.0})
    """1/r; as in the authors' experiments 1, after a uniform twentieth of the run."""


@register
class LinUpperWeigher(LossWeigher):
    """LinUpper (arXiv 2502.06733): w = softmax(min(h + 1, 1) / r), h the loss rescaled to [−1, 1] over the batch."""

    name = "linupper"
    Config = LinUpperConfig

    def _weigh(self, step: int, objective: str, scores: np.ndarray, samples: int) -> np.ndarray:
        return softmax_weights(self.temperature(step) * linupper(scores))
