"""What one rank sends in a step, by ZeRO stage, as Medley has DeepSpeed communicate.

Stages 0 and 1 reduce gradients once a step, stages 2 and 3 in every micro-step. Stages 1 and 2 reduce by an all-reduce
of whole buckets, of which each rank keeps its part, so they send half as much again as the reduce-scatter of arXiv
1910.02054, section 7.
"""

from collections.abc import Collection
from dataclasses import dataclass

from pretrain.planning.zero import FP32, Group, Zero, muon, numel, persistent, reused

# A rank's traffic in a ring, in units of the whole tensor × (ranks − 1) / ranks; gloo reduces all and scatters nothing.
_NCCL = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
_FACTORS = {"nccl": _NCCL, "gloo": {**_NCCL, "reduce-scatter": 2}}


@dataclass(frozen=True)
class Collective:
    """One kind of collective in a step: so many elements of so many bytes, over all its calls."""

    kind: str
    numel: int
    itemsize: int

    def sent(self, ranks: int, backend: str) -> float:
        """Bytes that each rank sends, and as many that it receives."""
        return _FACTORS[backend][self.kind] * self.numel * self.itemsize * (ranks - 1) / ranks


def collectives(groups: Collection[Group], zero: Zero, micro_steps: int) -> list[Collective]:
    """Return the collectives of a step of ``micro_steps`` micro-steps; scalars (norm, losses) and padding are left
    out."""
    whole, item = numel(groups), zero.itemsize
    found = []
    if zero.stage < 2:
        found.append(Collective("all-reduce", whole, item))
    if zero.stage == 2:
        found.append(Collective("all-reduce", micro_steps * whole, item))
    if zero.stage in (1, 2):
        found.append(Collective("all-gather", whole, item))
    if zero.stage == 3:
        kept = persistent(groups, zero)
        again = whole - kept - reused(groups, zero)  # given back after the forward
        found.append(Collective("all-gather", micro_steps * (whole - kept + again) + kept, item))
        found.append(Collective("reduce-scatter", micro_steps * whole, item))
    matrices = numel(muon(groups))
    if zero.stage and matrices:  # put together from the ranks' parts
        found.append(Collective("all-reduce", matrices, FP32))
    return found


def sent_per_step(groups: Collection[Group], zero: Zero, micro_steps: int, ranks: int, backend: str = "nccl") -> float:
    """Return the bytes that each rank sends in a step, by "nccl" on GPUs or "gloo" on CPUs."""
    return sum(each.sent(ranks, backend) for each in collectives(groups, zero, micro_steps))
