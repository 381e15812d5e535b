"""All private attributes of DeepSpeed that Medley touches, in one place; tests fail loudly when a version moves them.

ZeRO keeps the fp32 weights that the optimizer updates ("masters") in flat tensors: one a parameter group at stages 1
and 2, one a sub-group at stage 3, each rank holding its own part; at stage 0 the masters are the parameters themselves.
"""

import os

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from pretrain.training.flat import Flat, Fragment

_REDUCE_ELEMENTS = 500_000_000  # stage 0: elements reduced in one call


def flats(engine: DeepSpeedEngine) -> list[Flat]:
    """Return this rank's flat tensors in the order of the optimizer's groups; at stage 0 each parameter is its own."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [Flat(each, [each], [each.shape], [Fragment(each, 0, 0, each.numel())]) for each in parameters]
    if stage in (1, 2):
        pairs = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        return [Flat(master, group, [each.shape for each in group], _mapped(group)) for master, group in pairs]
    pairs = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    return [Flat(master, group, [each.ds_shape for each in group], _partitioned(group)) for master, group in pairs]


def _mapped(parameters: list[nn.Parameter]) -> list[Fragment]:
    found = []
    for parameter in parameters:
        if (mapping := parameter._hp_mapping) is not None:
            flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append(Fragment(parameter, flat.start, own.start, flat.numel))
    return found


def _partitioned(parameters: list[nn.Parameter]) -> list[Fragment]:
    found, offset = [], 0
    for parameter in parameters:
        room = parameter.partition_numel()  # the same on every rank; padding at the end
        start = room * torch.distributed.get_rank()
        if (numel := min(room, parameter.ds_numel - start)) > 0:
            found.append(Fragment(parameter, offset, start, numel))
        offset += room
    return found


def publish(engine: DeepSpeedEngine) -> None:
    """Copy the masters into the model's weights on all ranks, after the masters were written from outside."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


def forget_gradients(engine: DeepSpeedEngine) -> None:
    """Drop every accumulated gradient, so that the next backward starts a window as if none had been before.

    ``engine.zero_grad()`` is not enough: the buffers of stage 3 and of offload keep the gradients of parameters that
    take no part in the next window, and would apply them again (DeepSpeed issue 6554).
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    optimizer.zero_grad(set_to_none=True)
    if stage == 0:
        return
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
        offloaded = optimizer.offload_optimizer
    else:
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None
        for index in optimizer.all_grad_tensors:
            optimizer.all_grad_tensors[index] = None
        offloaded = optimizer.cpu_offload
        for accumulated in optimizer.accumulated_grads_in_cpu.values() if offloaded else ():
            accumulated.zero_()
    for flat in flats(engine) if offloaded else ():
        flat.master.grad.zero_()


def reduce_replicated_gradients(engine: DeepSpeedEngine) -> None:
    """Average the parameters' gradients over ranks at stage 0; parameters without one get zeros."""
    engine.buffered_allreduce_fallback(elements_per_buffer=_REDUCE_ELEMENTS)


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Return the global norm before clipping that the last ``engine.step()`` found; stages 1 to 3."""
    return float(engine.optimizer._global_grad_norm)


def avoid_shared_memory() -> None:
    """Keep DeepSpeed on the CPU from compiling (a minute at the first run) and using its /dev/shm all-reduce.

    It leaves 66 MiB a rank in /dev/shm at exit; gloo does the same work. With it off, LOCAL_SIZE does no harm, and
    without LOCAL_SIZE stage 3 starts a ``numactl`` process for every bucket of gradients to count devices.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def forget_process_group() -> None:
    """Make DeepSpeed's communication start anew at the next ``deepspeed.init_distributed``."""
    deepspeed.comm.comm.cdb = None
