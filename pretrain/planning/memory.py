"""Model states by ZeRO stage: what one GPU keeps of weights, gradients and optimizer states, as the engine keeps them.

Gradients are accumulated in fp32 at every stage, so these are not the numbers of arXiv 1910.02054, section 3, where
gradients stay in 16 bits; DeepSpeed's own estimators, which follow it, stand beside for comparison.
"""

from collections.abc import Collection
from dataclasses import dataclass

from pretrain.planning.buffers import in_micro_step, in_update
from pretrain.planning.zero import FP32, Group, Zero, largest, largest_share, muon, numel, persistent, touched

_STATES = {"adamw": 2, "muon": 1}  # algorithm → fp32 numbers a parameter


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one GPU, and on the host for each GPU."""

    weights: int
    gradients: int
    masters: int
    optimizer: int
    buffers: int
    """Buckets, copies and gathered weights, while a micro-step runs."""
    update: int
    """Copies while the optimizer updates, when there are no activations."""
    host: int
    """Offloaded states."""

    @property
    def kept(self) -> int:
        """Bytes on the GPU that stay from one step to the next, with the gradients of a step that is under way."""
        return self.weights + self.gradients + self.masters + self.optimizer

    def peak(self, activations: int) -> int:
        """Bytes on the GPU at the most, in a micro-step or in the update."""
        return self.kept + max(self.buffers + activations, self.update)


def model_states(groups: Collection[Group], zero: Zero, ranks: int) -> ModelStates:
    """Return what each of ``ranks`` GPUs keeps of a model with these parameter groups."""
    whole, item = numel(groups), zero.itemsize
    buffers, update = in_micro_step(groups, zero, ranks), in_update(groups, zero, ranks)
    if zero.stage == 0:  # the masters are the weights
        states = FP32 * sum(_STATES[group.algorithm] * group.numel for group in groups)
        return ModelStates(FP32 * whole, FP32 * whole, 0, states, buffers, update, 0)
    share = sum(group.share(ranks) for group in groups)
    weights, gradients, masters, host = item * whole, FP32 * share, FP32 * share, 0
    states = FP32 * sum(_STATES[group.algorithm] * group.share(ranks) for group in groups)
    if zero.stage == 3:
        weights = item * (share + persistent(groups, zero))
    elif zero.stage == 1:
        gradients = FP32 * whole
    elif not zero.bf16:  # sums of whole parameters, of which only this rank's elements count
        gradients = FP32 * touched(groups, ranks)
    if zero.offload:
        # The optimizer's own copy of the gradients, masters, its states, and the momentum's part of a Muon update.
        host = FP32 * share + masters + states + FP32 * largest_share(muon(groups), ranks)
        if zero.stage == 2:  # new weights on their way back, and a gradient on its way
            host += item * (share + largest(groups))
        if zero.stage == 3 or not zero.bf16:
            host, gradients = host + gradients, 0
        masters = states = 0
    return ModelStates(weights, gradients, masters, states, buffers, update, host)


def deepspeed_estimate(groups: Collection[Group], zero: Zero, gpus_per_node: int, nodes: int) -> int | None:
    """Return the bytes on one GPU by DeepSpeed's estimators, which know mixed precision at stages 2 and 3 only."""
    if not zero.bf16 or zero.stage < 2:
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    whole = numel(groups)
    if zero.stage == 2:
        return estimate_zero2_model_states_mem_needs(whole, gpus_per_node, nodes, cpu_offload=zero.offload)[1]
    return estimate_zero3_model_states_mem_needs(
        whole, largest(groups), gpus_per_node, nodes, cpu_offload=zero.offload, cpu_offload_params=False
    )[1]
