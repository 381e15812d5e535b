"""All private attributes of DeepSpeed that Medley touches, in one place; tests fail loudly when a version moves them.

ZeRO keeps the fp32 weights that the optimizer updates ("masters") in flat tensors: one a parameter group at stages 1
and 2, one a sub-group at stage 3, each rank holding its own part; at stage 0 the masters are the parameters themselves.
"""

import os

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

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
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None
        for index in optimizer.all_grad_tensors:
            optimizer.all_grad_tensors[index] = None
        offloaded = optimizer.cpu_offload
        optimizer._wait_for_offload_copies()  # a late one would bring back what is zeroed here
        for accumulated in optimizer.accumulated_grads_in_cpu.values() if offloaded else ():
            accumulated.zero_()
    for flat in flats(engine) if offloaded else ():
        flat.master.grad.zero_()


@torch.no_grad()
def read_gradient(engine: DeepSpeedEngine, into: list[Tensor] | None = None) -> list[Tensor]:
    """Return a copy of this rank's part of what the backwards since ``forget_gradients`` add up to.

    One fp32 tensor a flat, laid out like its master and zero where no backward came by; at stage 0 the rank's slice of
    each parameter. All ranks call it. Nothing is finalised as ``engine.step()`` would: stages 2 and 3 sum the shards in
    every backward, and stages 0 and 1 have this rank's own gradients of whole parameters, averaged here one by one.
    ``into`` is what an earlier call returned, to be written over.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    cut = shards(engine)
    parts = into or [torch.empty_like(flat.master, dtype=torch.float32) for flat in cut]
    if stage == 3:
        for part, summed in zip(parts, _summed_by_stage_3(optimizer, parts), strict=True):
            part.copy_(summed)
    elif _sums_in_flats(engine):
        for index, part in enumerate(parts):
            summed = optimizer.averaged_gradients.get(index)
            part.zero_() if summed is None else part.copy_(summed.flat_partition)
    else:
        for index, (flat, part) in enumerate(zip(cut, parts, strict=True)):
            whole = _summed_by_parameter(engine, index, flat)
            own = {id(fragment.parameter): fragment for fragment in flat.fragments}
            part[max((each.offset + each.numel for each in flat.fragments), default=0) :].zero_()  # the padding
            for parameter in flat.parameters:
                summed = whole.get(id(parameter))
                if stage < 2:
                    summed = _mean_over_ranks(parameter, summed)
                if (fragment := own.get(id(parameter))) is not None:
                    own_part = fragment.of(part)
                    own_part.zero_() if summed is None else own_part.copy_(fragment.within(summed))
    return parts


@torch.no_grad()
def write_gradient(engine: DeepSpeedEngine, parts: list[Tensor]) -> None:
    """Replace the accumulated gradient by ``parts``, such as ``read_gradient`` gives, as if a backward left them."""
    forget_gradients(engine)
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    cut = shards(engine)
    if stage == 3:
        for part, summed in zip(parts, _summed_by_stage_3(optimizer, parts), strict=True):
            summed.copy_(part)
        optimizer._offload_boundary_param_ids |= {each.parameter.ds_id for flat in cut for each in flat.fragments}
        optimizer.independent_gradient_partition_epilogue()  # shows step() the sums, and has the next backward add
        return
    for index, (flat, part) in enumerate(zip(cut, parts, strict=True)):
        if _sums_in_flats(engine):
            summed = optimizer._build_compact_grad_partition_buffer(index)
            summed.flat_partition.copy_(part)
            optimizer.averaged_gradients[index] = summed
            continue
        _make_sums(engine, index, flat)
        whole = _summed_by_parameter(engine, index, flat)
        factor = torch.distributed.get_world_size() if stage < 2 else 1  # the mean over ranks is still to come
        for fragment in flat.fragments:
            fragment.within(whole[id(fragment.parameter)]).copy_(fragment.of(part) * factor)
    if stage == 1:
        optimizer.setup_buckets()  # as the first gradient of a backward does
    elif stage == 2 and optimizer.cpu_offload:
        ids = {optimizer.get_param_id(each.parameter) for flat in cut for each in flat.fragments}
        optimizer._offload_accumulated_param_ids |= ids
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID + 1  # has the next backward add


def shards(engine: DeepSpeedEngine) -> list[Flat]:
    """Return the flats such that no two ranks hold the same element: at stage 0 each rank's is a slice."""
    found = flats(engine)
    if engine.zero_optimization_stage() > 0:
        return found
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for index, flat in enumerate(found):
        numel = flat.master.numel()
        start, end = numel * rank // ranks, numel * (rank + 1) // ranks
        own = Fragment(flat.master, 0, start, end - start)
        found[index] = Flat(own.within(flat.master), flat.parameters, flat.shapes, [own])
    return found


def _sums_in_flats(engine: DeepSpeedEngine) -> bool:
    """Whether stage 2 adds up in tensors laid out like the masters: where gradients are of another type than they."""
    return engine.zero_optimization_stage() == 2 and engine.bfloat16_enabled()


def _summed_by_stage_3(optimizer, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the views of stage 3's one buffer that are laid out like ``parts``."""
    return optimizer.grad_partitions_flat_buffer.split([part.numel() for part in parts])


def _summed_by_parameter(engine: DeepSpeedEngine, index: int, flat: Flat) -> dict[int, Tensor]:
    """Return the whole tensors in which stages 0 to 2 add up fp32 gradients of a flat's parameters, by their ids.

    At stage 2 only the elements of this rank's fragments mean something in them.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 2:
        return {id(each): each.grad for each in flat.parameters if each.grad is not None}
    parameters = optimizer.params_in_partition[index]
    if optimizer.cpu_offload:
        optimizer._wait_for_offload_copies()
        sums = (optimizer.accumulated_grads_in_cpu.get(optimizer.get_param_id(each)) for each in parameters)
    else:
        sums = optimizer.all_grad_tensors.get(index) or [None] * len(parameters)
    return {id(each): summed for each, summed in zip(parameters, sums, strict=True) if summed is not None}


def _make_sums(engine: DeepSpeedEngine, index: int, flat: Flat) -> None:
    """Make the tensors of ``_summed_by_parameter``, of zeros."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 2:
        for parameter in flat.parameters:
            parameter.grad = torch.zeros_like(parameter)
        return
    parameters = optimizer.params_in_partition[index]
    if optimizer.cpu_offload:
        sums = optimizer.accumulated_grads_in_cpu  # forget_gradients has zeroed those there are
        for each in (each for each in parameters if optimizer.get_param_id(each) not in sums):
            sums[optimizer.get_param_id(each)] = torch.zeros(each.numel(), device=optimizer.device)
    else:
        optimizer.all_grad_tensors[index] = [torch.zeros_like(each) for each in parameters]


def _mean_over_ranks(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    """Return the mean of all ranks' gradients of a whole parameter, in a tensor of its own; no gradient is zero."""
    mean = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    torch.distributed.all_reduce(mean)
    return mean.div_(torch.distributed.get_world_size())


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
