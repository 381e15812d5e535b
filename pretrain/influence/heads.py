"""Vocabulary heads, whose last layer gives a loss and no outputs: what their calls add to norms and gradients."""

from typing import NamedTuple

import torch

from fused_objectives.embedding_norms import tied_cross_term
from fused_objectives.linear_cross_entropy import linear_cross_entropy
from fused_objectives.segments import per_token
from pretrain.influence.layers import LinearLayer, Measure, Use
from pretrain.objectives.scores import CrossEntropyScore


class HeadUse(NamedTuple):
    """What is kept of a vocabulary head's call."""

    layer: LinearLayer
    score: CrossEntropyScore
    bias: torch.Tensor | None
    """``[V]``: a copy of all that is added to the logits."""
    features: torch.Tensor
    """``[K, d]``."""
    segments: torch.Tensor
    """``[K]`` int64: which of the S samples a row belongs to."""
    normalizers: torch.Tensor | None = None
    """``[K]`` float32."""
    norms: torch.Tensor | None = None
    """``[S]`` float32, of the samples' losses without weights."""
    factor: torch.Tensor | None = None
    """``[]``: the gradient that came to the total."""

    @property
    def own_weights(self) -> torch.Tensor | None:
        """``[K]``: the samples' weights in the loss, if there are any."""
        return None if self.score.weights is None else per_token(self.score.weights, self.score.segments)

    def squared_norms(self, measure: Measure) -> torch.Tensor:
        """Return each sample's squared norm of the gradient of matrix and bias, ``[S]`` float32."""
        if self.norms is not None:
            weights = self.factor if self.score.weights is None else self.factor * self.score.weights
            return self.norms * weights.square()
        loss = linear_cross_entropy(
            self.features,
            self.layer.module.weight,
            self.score.labels,
            self.segments,
            measure.samples,
            bias=self.bias,
            token_weights=self.own_weights,
            squared_norms=True,
            impl=measure.impl,
        )
        return loss.squared_norms * self.factor.square()

    def product(self, table: Use, measure: Measure) -> torch.Tensor:
        """Return each sample's inner product of the gradients that the matrix gets here and as a table, ``[S]``."""
        product = tied_cross_term(
            self.features,
            self.layer.module.weight,
            self.score.labels,
            self.segments,
            self.normalizers,
            table.inputs,
            table.gradients,
            table.segments,
            measure.samples,
            bias=self.bias,
            token_weights=self.own_weights,
            impl=measure.impl,
        )
        return product * self.factor

    def gradients(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """Return Σ_s w_s · gradient of sample s of the matrix, and of a trained bias; weights are ``[S]``."""
        matrix, *bias = self.layer.parameters
        rows = per_token(weights * self.factor, self.segments)
        found = self.score.gradients(self.features, self.layer.module.weight, self.bias, rows)
        return [gradient.to(each.dtype) for gradient, each in zip(found, [matrix, *bias], strict=False)]
