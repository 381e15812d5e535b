"""Model states by ZeRO stage: what one GPU keeps of weights, gradients and optimizer states, as the engine keeps them.

Gradients are accumulated in fp32 at every stage, so these are not the numbers of arXiv 1910.02054, section 3, where
gradients stay in 16 bits; DeepSpeed's own estimators, which follow it, stand beside for comparison.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

FP32 = 4  # bytes
_STATES = {"adamw": 2, "muon": 1}  # algorithm → fp32 numbers a parameter


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


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one GPU, and on the host for each GPU."""

    weights: int
    gradients: int
    masters: int
    optimizer: int
    buffers: int
    """Buckets and gathered weights, while a micro-step runs."""
    host: int
    """Offloaded states."""

    @property
    def kept(self) -> int:
        """Bytes on the GPU that stay from one step to the next, with the gradients of a step that is under way."""
        return self.weights + self.gradients + self.masters + self.optimizer

    @property
    def total(self) -> int:
        """Bytes on the GPU without activations."""
        return self.kept + self.buffers


def groups_of(param_groups: Collection[dict]) -> list[Group]:
    """Return the groups of ``build_optimizer(…).param_groups``."""
    return [Group(tuple(each.numel() for each in group["params"]), group["algorithm"]) for group in param_groups]


def model_states(groups: Collection[Group], zero: Zero, ranks: int) -> ModelStates:
    """Return what each of ``ranks`` GPUs keeps of a model with these parameter groups."""
    whole = sum(group.numel for group in groups)
    if zero.stage == 0:  # the masters are the weights
        states = FP32 * sum(_STATES[group.algorithm] * group.numel for group in groups)
        return ModelStates(FP32 * whole, FP32 * whole, 0, states, 0, 0)
    shard = FP32 * sum(group.share(ranks) for group in groups)
    states = FP32 * sum(_STATES[group.algorithm] * group.share(ranks) for group in groups)
    gradients, masters, host = FP32 * whole if zero.stage == 1 else shard, shard, 0
    if zero.stage == 3:
        weights = zero.itemsize * sum(group.share(ranks) for group in groups)
        weights += zero.itemsize * sum(persistent(groups, zero))
        masters = shard if zero.bf16 or zero.offload else 0  # in fp32 they are the shard of the weights itself
    else:
        weights = zero.itemsize * whole
    if zero.offload:
        # Beside the sums, the optimizer has its own copy of the gradients.
        host, gradients, masters, states = 2 * gradients + masters + states, 0, 0, 0
    return ModelStates(weights, gradients, masters, states, _buffers(groups, zero), host)


def persistent(groups: Collection[Group], zero: Zero) -> list[int]:
    """Return the sizes of the parameters that stage 3 keeps whole on every rank."""
    return [numel for group in groups for numel in group.numels if numel < zero.persistence_threshold]


def live_at_once(groups: Collection[Group], zero: Zero) -> int:
    """Return how many elements stage 3 keeps whole from a micro-step's forward to its backward.

    A weight is not given back when it is needed again before ``stage3_max_reuse_distance`` elements have passed: that
    is the last half of the distance in the order of the forward.
    """
    return min(sum(group.numel for group in groups) - sum(persistent(groups, zero)), zero.reuse_distance // 2)


def deepspeed_estimate(groups: Collection[Group], zero: Zero, gpus_per_node: int, nodes: int) -> int | None:
    """Return the bytes on one GPU by DeepSpeed's estimators, which know mixed precision at stages 2 and 3 only."""
    if not zero.bf16 or zero.stage < 2:
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    whole, largest = (each(numel for group in groups for numel in group.numels) for each in (sum, max))
    if zero.stage == 2:
        return estimate_zero2_model_states_mem_needs(whole, gpus_per_node, nodes, cpu_offload=zero.offload)[1]
    return estimate_zero3_model_states_mem_needs(
        whole, largest, gpus_per_node, nodes, cpu_offload=zero.offload, cpu_offload_params=False
    )[1]


def _buffers(groups: Collection[Group], zero: Zero) -> int:
    if zero.stage == 3:
        largest = max(numel for group in groups for numel in group.numels)
        whole = sum(group.numel for group in groups)
        gathered = min(whole, live_at_once(groups, zero) + zero.prefetch_bucket + largest)
        return zero.itemsize * (zero.reduce_bucket + gathered)
    buckets = (1 + zero.overlap) * zero.contiguous * zero.reduce_bucket
    return zero.itemsize * buckets
