"""How parameters lie in the flat tensors an optimizer updates under ZeRO; knows no DeepSpeed.

Saving, loading, consolidating and Muon all stand on this description, so none of them knows a ZeRO stage.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """``numel`` elements of ``parameter``, from its flattened index ``start``, at ``offset`` of a flat tensor."""

    parameter: nn.Parameter
    offset: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """Return this fragment's view ``[numel]`` of a flat master or of any tensor laid out like it."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)

    def within(self, whole: Tensor) -> Tensor:
        """Return this fragment's view ``[numel]`` of the whole parameter or of any tensor of as many elements."""
        return whole.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Flat:
    """One tensor the optimizer updates (a key of its ``state``) and what of it lies on this rank.

    ``parameters`` are those cut into it over all ranks, in the same order on each, ``shapes`` their whole shapes;
    ``fragments`` are this rank's parts, possibly none. At stage 0 the one parameter is the master.
    """

    master: Tensor
    parameters: list[nn.Parameter]
    shapes: list[torch.Size]
    fragments: list[Fragment]
