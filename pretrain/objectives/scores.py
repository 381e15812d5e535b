"""Losses in the place of a head's last layer, as objects: who records gradients per sample can ask them for more."""

from dataclasses import dataclass
from typing import Any

import torch

from fused_objectives.detection import Detection, detection_loss
from fused_objectives.generator_sampling import Sampled, linear_cross_entropy_and_sample
from fused_objectives.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_gradients
from fused_objectives.segments import per_token
from fused_objectives.targets import IGNORED


@dataclass(frozen=True)
class _Score:
    labels: torch.Tensor
    """``[K]`` int64, ``IGNORED`` where there is no target."""
    segments: torch.Tensor
    """``[K]`` int64: which of the samples a row belongs to, −1: none."""
    samples: int
    weights: torch.Tensor | None
    """``[samples]`` float32, the samples' weights; None means 1."""
    impl: str


@dataclass(frozen=True)
class CrossEntropyScore(_Score):
    """The cross entropy of the labels."""

    def __call__(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any):
        """Return a :class:`~fused_objectives.linear_cross_entropy.LinearCrossEntropy`; ``options`` are the op's."""
        targets = self.labels, self.segments, self.samples
        options |= {"bias": bias, "sample_weights": self.weights, "impl": self.impl}
        return linear_cross_entropy(features, weight, *targets, **options)

    def gradients(
        self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients by weight and bias of the loss whose rows have ``weights [K]`` beside the samples'."""
        targets = self.labels, self.segments, self.samples
        options = {"bias": bias, "sample_weights": self.weights, "token_weights": weights, "impl": self.impl}
        return linear_cross_entropy_gradients(features, weight, *targets, hidden_gradient=False, **options)[1:]


@dataclass(frozen=True)
class SamplingScore(CrossEntropyScore):
    """The same, and a token drawn for each label."""

    positions: torch.Tensor
    """``[K]`` int64: positions within the samples."""
    sample_ids: torch.Tensor
    """``[samples]`` int64, as ``visits``."""
    visits: torch.Tensor
    seed: int
    stream: str
    temperature: float

    def __call__(self, features, weight, bias, **options: Any) -> Sampled:
        keys = self.positions, self.sample_ids, self.visits
        options |= {"bias": bias, "sample_weights": self.weights, "impl": self.impl}
        options |= {"seed": self.seed, "stream": self.stream, "temperature": self.temperature}
        targets = self.labels, self.segments, self.samples
        return linear_cross_entropy_and_sample(features, weight, *targets, *keys, **options)


@dataclass(frozen=True)
class DetectionScore(_Score):
    """The binary cross entropy of the labels, 0 and 1, of a layer with one output."""

    token_weights: torch.Tensor | None = None
    """``[K]`` float32, factors on the rows' losses; None means 1."""

    def __call__(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Detection:
        """Return the loss."""
        targets = self.labels, self.segments, self.samples
        weights = {"sample_weights": self.weights, "token_weights": self.token_weights}
        options = {"bias": bias, **weights, "impl": self.impl}
        return detection_loss(features, weight[0], *targets, **options)

    def slopes(self, loss: Detection) -> torch.Tensor:
        """Return the derivatives of the total by the logits, ``[K]`` float32."""
        slopes = torch.where(self.labels == IGNORED, 0.0, torch.sigmoid(loss.logits) - self.labels)
        if self.token_weights is not None:
            slopes = slopes * self.token_weights
        return slopes if self.weights is None else slopes * per_token(self.weights, self.segments)
