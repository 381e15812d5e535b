"""A gradient cut into shards, as ZeRO leaves it: compared and put together without any rank holding the whole."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements turned to fp64 at a time: 16 MiB, however large the shard


@dataclass(frozen=True)
class Gradient:
    """This rank's part of the gradient of a sum over all ranks; the parts of all ranks are the whole of it once.

    ``parts`` maps each component ("backbone", "head/mlm") to its shards ``[elements] fp32`` in the engine's order, zero
    in the padding and where the loss did not reach. Ranks hold disjoint elements at every stage, stage 0 included.
    """

    parts: dict[str, list[Tensor]]

    def dot(self, other: "Gradient", components: Collection[str] | None = None) -> Tensor:
        """Return this rank's share of the inner product, ``[] fp64``; over ``components`` only, if they are named."""
        total = torch.zeros((), dtype=torch.float64)
        for component, shards in self.parts.items():
            if components is None or component in components:
                for left, right in zip(shards, other.parts[component], strict=True):
                    for left_chunk, right_chunk in zip(left.split(_CHUNK), right.split(_CHUNK), strict=True):
                        total = total + left_chunk.double() @ right_chunk.double()
        return total

    @staticmethod
    def combine(gradients: Sequence["Gradient"], weights: Sequence[float], *, in_place: bool = False) -> "Gradient":
        """Return Σ ``weights[i]`` · ``gradients[i]``, of at least one gradient, shard by shard in fp32; ``in_place`` in
        the memory of the first."""

        def weighted_sum(shards: tuple[Tensor, ...]) -> Tensor:
            total = shards[0].mul_(weights[0]) if in_place else shards[0] * weights[0]
            for shard, weight in zip(shards[1:], weights[1:], strict=True):
                total.add_(shard, alpha=weight)
            return total

        return Gradient(
            {
                component: [
                    weighted_sum(shards) for shards in zip(*(each.parts[component] for each in gradients), strict=True)
                ]
                for component in gradients[0].parts
            }
        )
