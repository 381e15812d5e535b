"""What a plan knows of a run: the DeepSpeed configuration's words on memory and communication, and the optimizer's
groups."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate

import torch

FP32 = 4  # bytes


@dataclass(frozen=True)
class Zero:
    """What a resolved DeepSpeed configuration says of memory and communication; buckets in elements."""

    stage: int
    bf16: bool
    offload: bool
    contiguous: bool
    overlap: bool
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    reuse_distance: int
    max_live: int

    @classmethod
    def of(cls, ds_config: dict) -> "Zero":
        """Read what ``resolve_ds_config`` returns; absent keys have DeepSpeed's defaults."""
        zero = ds_config["zero_optimization"]
        stage = zero["stage"]
        return cls(
            stage=stage,
            bf16=ds_config["bf16"]["enabled"],
            offload=zero.get("offload_optimizer", {}).get("device") == "cpu",
            contiguous=zero.get("contiguous_gradients", True),
            overlap=zero["overlap_comm"],
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            reuse_distance=int(zero.get("stage3_max_reuse_distance", 1e9)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
        )

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, and of a gradient on its way between ranks."""
        return 2 if self.bf16 else FP32

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class Group:
    """One group of the optimizer: the sizes of its parameters, and what updates them."""

    numels: tuple[int, ...]
    algorithm: str = "adamw"

    @property
    def numel(self) -> int:
        return sum(self.numels)

    def share(self, ranks: int) -> int:
        """Elements of one rank's part; the last one's is padded."""
        return -(-self.numel // ranks)

    def touched(self, rank: int, ranks: int) -> int:
        """Elements of all parameters of which a rank's part holds any, where stages 1 and 2 cut the group."""
        ends = list(accumulate(self.numels))
        start, end = (min(at * self.share(ranks), self.numel) for at in (rank, rank + 1))
        return sum(self.numels[bisect_right(ends, start) : bisect_left(ends, end) + 1]) if start < end else 0


def groups_of(param_groups: Collection[dict]) -> list[Group]:
    """Return the groups of ``build_optimizer(…).param_groups``."""
    return [Group(tuple(each.numel() for each in group["params"]), group["algorithm"]) for group in param_groups]


def numel(groups: Collection[Group]) -> int:
    """Return the elements of all parameters."""
    return sum(group.numel for group in groups)


def largest(groups: Collection[Group]) -> int:
    """Return the elements of the largest parameter."""
    return max((each for group in groups for each in group.numels), default=0)


def largest_share(groups: Collection[Group], ranks: int) -> int:
    """Return the elements of one rank's part of the largest group."""
    return max((group.share(ranks) for group in groups), default=0)


def muon(groups: Collection[Group]) -> list[Group]:
    """Return the groups that Muon updates."""
    return [group for group in groups if group.algorithm == "muon"]


def touched(groups: Collection[Group], ranks: int) -> int:
    """Return the elements of all parameters of which one rank holds a part, for the rank that has most."""
    return max(sum(group.touched(rank, ranks) for group in groups) for rank in range(ranks))


def persistent(groups: Collection[Group], zero: Zero) -> int:
    """Return the elements of the parameters that stage 3 keeps whole on every rank."""
    return sum(numel for group in groups for numel in group.numels if numel < zero.persistence_threshold)


def reused(groups: Collection[Group], zero: Zero) -> int:
    """Return how many elements stage 3 keeps whole from a micro-step's forward to its backward.

    A weight is not given back when it is needed again before ``stage3_max_reuse_distance`` elements have passed: that
    is the last half of the distance in the order of the forward.
    """
    return min(numel(groups) - persistent(groups, zero), zero.reuse_distance // 2)


def gathered(groups: Collection[Group], zero: Zero) -> int:
    """Return how many elements stage 3 may have whole at once, those it keeps whole always left out.

    Every module, also one without weights, fetches ``stage3_prefetch_bucket_size`` elements more, and what is fetched
    for a later use is not given back before it: only ``stage3_max_live_parameters`` ends that.
    """
    whole = numel(groups) - persistent(groups, zero)
    ahead = zero.max_live if zero.prefetch_bucket else 0
    return min(whole, max(reused(groups, zero), ahead) + largest(groups))
