"""Gradient norms per sample, read off an ordinary backward, and the weighted gradient without a second one.

No sample's gradient is ever formed. A layer's gradient is a sum over the rows it sees, so the inputs and the gradients
at the outputs say all that there is to know (arXiv 1510.01799; for self-influence arXiv 2311.00913).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.influence.layers import Layer, Measure
from pretrain.influence.ledger import Ledger, weighted_gradients
from pretrain.influence.selection import find_layers, select
from pretrain.influence.taps import tapped
from pretrain.influence.trial import try_layers
from pretrain.model.multi_objective import MultiObjectiveModel


class GhostNorms:
    """Per-sample squared gradient norms of a model's layers, read off an ordinary backward; and, deferred, the weighted
    gradient without a second backward.

    Args:
        model: its parameters that need no gradient now are never looked at.
        layers: K, whose norms are found: ``all``, ``first_block`` (the first encoder block, and the first decoder block
            of an encoder–decoder), ``layer_norms``, or names or patterns of modules.
        score: ``gram``: exact; ``sketch``: the same but for linear layers, where an unbiased estimate is taken;
            ``layer_norm``: exact, of the normalisations among K alone.
        sketch_size: rows and columns of a sketch.
        seed: of the sketch.
        impl: which implementation the ops take.
        longest: tokens of the longest sample, or a bound on it, by which the cheaper way to a norm is chosen; None: the
            length of a row.

    Raises:
        UserError: ``weigher.layers: …``, if the model lacks K or K's norms cannot be found.
    """

    def __init__(
        self,
        model: MultiObjectiveModel,
        layers: str | list[str],
        score: Literal["gram", "sketch", "layer_norm"],
        *,
        sketch_size: int = 16,
        seed: int = 0,
        impl: str = "auto",
        longest: int | None = None,
    ):
        self._layers, idle = try_layers(model, find_layers(model))
        self._measured = select(model, layers, self._layers, idle, norms_only=score == "layer_norm")
        measured = {id(p): p for each in self._layers if self._is_measured(each) for p in each.parameters}
        self.parameters = list(measured.values())
        """K's."""
        self._score: Literal["gram", "sketch"] = "sketch" if score == "sketch" else "gram"
        self._sketch = {"sketch_size": sketch_size, "seed": seed}
        self._impl, self._longest = impl, longest
        self._ledger: Ledger | None = None
        self.why_not_deferred = self._find_why_not(model, idle)
        """Why there is no deferred form for this model; None if there is: every trained parameter is one of a layer
        whose gradient can be told apart by sample."""

    @contextmanager
    def recording(self, batch: Batch, *, deferred: bool, step: int = 0) -> Iterator[None]:
        """Record the forward and the backward, within, of one objective's loss on one micro-batch.

        With ``deferred`` the backward must be ``torch.autograd.backward``. It gives no parameter a gradient, and no
        parameter's hooks fire. All layers' inputs and gradients at their outputs are kept until :meth:`injected`.

        Args:
            batch: the micro-batch, of S samples.
            step: sketches of one step have the same signs, those of another step others.
        """
        if deferred and self.why_not_deferred:
            raise RuntimeError(self.why_not_deferred)
        samples, device = len(batch.sample_ids), batch.tokens.device
        longest = self._longest if self._longest is not None or not batch.tokens.is_cuda else batch.tokens.shape[1]
        measure = Measure(self._score, samples, self._impl, **self._sketch, stream=f"ghost/{step}", longest=longest)
        self._ledger = Ledger(self._measured, measure, keeps=deferred, device=device)
        layers = [each for each in self._layers if deferred or self._is_measured(each)]
        anchor = torch.zeros((), device=device, requires_grad=True) if deferred else None
        with tapped(layers, self._ledger, anchor):
            yield

    def squared_norms(self) -> torch.Tensor:
        """Return each sample's squared norm of its gradient over K, ``[S]`` float32; 0 for samples without target.

        The gradient is that of the very scalar whose backward was recorded: if a sample's loss enters it with a
        factor (scale, weight, world size), its squared norm has the factor's square. Divide by it, if it is not 0, for
        those of the loss itself.
        """
        return self._ledger.squared_norms()

    def injected(self, weights: torch.Tensor) -> torch.Tensor:
        """Return a scalar 0 whose backward gives every parameter Σ_s w_s · gradient of sample s, with ``weights [S]``.

        Of a deferred recording, once. Every parameter that the loss reached accumulates once, a tied one too.
        """
        total = torch.zeros((), device=weights.device)
        weights, self._ledger, ledger = weights.detach().float(), None, self._ledger
        for parameters, told in reversed(ledger.take()):
            total = total + _Injected.apply(weights, told, *parameters)
        return total

    def _is_measured(self, layer: Layer) -> bool:
        return id(layer.parameters[0]) in self._measured

    def _find_why_not(self, model: MultiObjectiveModel, idle: set[int]) -> str | None:
        if model.encoder.activation_checkpointing:
            return "model.activation_checkpointing recomputes what the deferred gradient would have to keep"
        known = idle | {id(each) for layer in self._layers for each in layer.parameters}
        lost = next((n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known), None)
        return lost and f"{lost} lies in no layer whose gradient can be told apart by sample"


class _Injected(torch.autograd.Function):
    """Returns 0, with the weighted gradients of some parameters as gradient by them."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, told: list, *parameters: nn.Parameter):
        ctx.weights, ctx.told, ctx.parameters = weights, told, parameters
        return weights.new_zeros(())

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        told, ctx.told = ctx.told, None
        return None, None, *weighted_gradients(list(ctx.parameters), told, ctx.weights * upstream)
