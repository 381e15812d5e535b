"""Vocabulary heads, whose last layer gives a loss and no outputs: what their calls add to norms and gradients."""

from typing import NamedTuple

import torch

from fused_objectives.embedding_norms import tied_cross_term
from fused_objectives.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from fused_objectives.matmul import accumulate_rows
from fused_objectives.segments import per_token
from fused_objectives.weighted_gradient import weighted_gradient
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
    loss: LinearCrossEntropy | None = None
    """What came of it: norms of the samples' losses without weights, and gradients by the logits, if they are kept."""
    factor: torch.Tensor | None = None
    """``[]``: the gradient that came to the total."""

    @property
    def own_weights(self) -> torch.Tensor | None:
        """``[K]``: the samples' weights in the loss, if there are any."""
        return None if self.score.weights is None else per_token(self.score.weights, self.score.segments)

    def squared_norms(self, measure: Measure) -> torch.Tensor:
        """Return each sample's squared norm of the gradient of matrix and bias, ``[S]`` float32."""
        if self.loss.squared_norms is not None:
            weights = self.factor if self.score.weights is None else self.factor * self.score.weights
            return self.loss.squared_norms * weights.square()
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
            self.loss.log_normalizers,
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
        weights = weights * self.factor
        if self.loss.logit_gradients is None:
            rows = per_token(weights, self.segments)
            found = self.score.gradients(self.features, self.layer.module.weight, self.bias, rows)
        else:
            found = self._of_kept(weights if self.score.weights is None else weights * self.score.weights)
        return [gradient.to(each.dtype) for gradient, each in zip(found, self.layer.parameters, strict=False)]

    def _of_kept(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slopes, places = self.loss.logit_gradients, self.loss.places
        segments = torch.where(places < 0, -1, self.segments[places])
        matrix = weighted_gradient(self.features[places].to(slopes.dtype), slopes, segments, weights)
        bias = weights.new_zeros(slopes.shape[1])
        accumulate_rows(bias, slopes, per_token(weights, segments))
        return matrix, bias
