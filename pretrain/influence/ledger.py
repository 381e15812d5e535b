"""What a recording has found: the norms so far, and what layers have kept."""

from collections.abc import Collection

import torch
from torch import nn

from pretrain.influence.heads import HeadUse
from pretrain.influence.layers import Layer, Measure, Use

_ROOM = 0.25
"""Of the gradients at the layers' outputs: what may be kept besides them to save time."""


class Ledger:
    """Takes what layers tell in a backward. Layers that share a matrix are one: their gradients add up, and the squared
    norm of the sum is no sum of squared norms.

    Args:
        measured: their parameters whose gradients' norms are asked for, by id.
        measure: how.
        keeps: keep all that is told, for :meth:`gradients`. Otherwise only what has to wait for another layer is kept.
        device: of the batch.
    """

    def __init__(self, measured: Collection[int], measure: Measure, keeps: bool, device: torch.device):
        self.measured, self.measure, self.keeps = measured, measure, keeps
        self.expected: dict[int, int] = {}
        self.numbers = 0
        """Of the outputs of layers so far; as many gradients will come."""
        self.uses: dict[int, list[tuple[Layer, Use | HeadUse]]] = {}
        self.norms = torch.zeros(measure.samples, device=device)

    def measures(self, layer: Layer) -> bool:
        """Whether the layer's norms are asked for."""
        return id(layer.parameters[0]) in self.measured

    def has_room(self, numbers: int) -> bool:
        """Whether so many numbers are few beside the gradients that will come."""
        return numbers <= _ROOM * self.numbers

    def expect(self, layer: Layer) -> None:
        """Take note of a call, of which the backward may tell."""
        key = id(layer.parameters[0])
        self.expected[key] = self.expected.get(key, 0) + 1

    def keep(self, layer: Layer, use: Use | HeadUse) -> None:
        """Take what the backward of a call tells, a sample's rows in one run; measure as soon as all calls of the
        matrix have told.

        Then its layer's weights are at hand, at ZeRO-3 too.
        """
        key = id(layer.parameters[0])
        uses = self.uses.setdefault(key, [])
        uses.append((layer, use if isinstance(use, HeadUse) else layer.kept(use, self.measure)))
        if len(uses) == self.expected[key]:
            self._measure(key)

    def refuse(self, layer: Layer) -> None:
        """Take note of a call on rows that are none of samples.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{layer.name}: its rows are none of samples, so its gradient cannot be told apart")

    def squared_norms(self) -> torch.Tensor:
        """Return the squared norms ``[S]`` float32 of what was told."""
        for key in [key for key, uses in self.uses.items() if len(uses) < self.expected[key]]:
            self.expected[key] = len(self.uses[key])  # not every call reached the loss
            self._measure(key)
        return self.norms

    def take(self) -> list[tuple[list[nn.Parameter], list[tuple[Layer, Use | HeadUse]]]]:
        """Return for each matrix what was told of it, with the parameters of its layers, in the order of the backward;
        nothing is kept here any longer."""
        uses, self.uses = self.uses, {}
        found = []
        for told in uses.values():
            parameters = {id(each): each for layer, _ in told for each in layer.parameters}
            found.append((list(parameters.values()), told))
        return found

    def _measure(self, key: int) -> None:
        if key in self.measured:
            self.norms += _squared_norms(self.uses[key], self.measure)
        if not self.keeps:
            del self.uses[key]


def _squared_norms(told: list[tuple[Layer, Use | HeadUse]], measure: Measure) -> torch.Tensor:
    """Return the squared norms ``[S]`` of all uses of a matrix together."""
    heads = [use for _, use in told if isinstance(use, HeadUse)]
    others = [(layer, use) for layer, use in told if not isinstance(use, HeadUse)]
    if len(heads) > 1:
        raise RuntimeError(f"{heads[0].layer.name}: several losses in one recording")
    norms = sum(head.squared_norms(measure) for head in heads)
    if others:
        layer, use = others[0][0], others[0][1] if len(others) == 1 else Use.joined([use for _, use in others])
        norms = norms + layer.squared_norms(use, measure) + 2 * sum(head.product(use, measure) for head in heads)
    return norms.clamp(min=0)


def weighted_gradients(
    parameters: list[nn.Parameter], told: list[tuple[Layer, Use | HeadUse]], weights: torch.Tensor
) -> list[torch.Tensor]:
    """Return Σ_s w_s · gradient of sample s of each parameter, over all that was told."""
    sums: dict[int, torch.Tensor] = {}
    for layer, use in told:
        found = use.gradients(weights) if isinstance(use, HeadUse) else layer.gradients(use, weights)
        for parameter, gradient in zip(layer.parameters, found, strict=True):
            sums[id(parameter)] = sums[id(parameter)].add_(gradient) if id(parameter) in sums else gradient
    return [sums[id(parameter)] for parameter in parameters]
