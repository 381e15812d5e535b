"""What the engine refuses, how it joins and leaves the other ranks, and DeepSpeed's parts it reaches into."""

import datetime
import logging
import os
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.runtime.constants import MANAGED_GRADIENT_ACCUMULATION
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

from pretrain.errors import UserError
from pretrain.training import ds_config
from pretrain.training.engine import Engine, init_distributed
from tests.training.test_engine import BEFORE, small_config
from tests.training.toy import ADAMW, Toy, Trace, groups_of, take_step, tokens

WORK = {"lm": tokens(2, 1)}


def make_engine(name: str, world_size: int = 2) -> Engine:
    init_distributed(60)
    module = Toy()
    return Engine(module, groups_of(module), small_config(name, world_size), ADAMW)


def message_of(kind: type[Exception], function, *args) -> str:
    try:
        function(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{function} did not raise {kind}")


def misuse(name: str, folder: Path) -> dict[str, str]:
    """Make every mistake once; return the messages."""
    engine = make_engine(name, 1)
    engine.begin_step()
    told = {"step first": message_of(RuntimeError, engine.step, 0.1, {"backbone"})}
    loss = engine(WORK)
    engine.backward(loss)
    told["backward twice"] = message_of(RuntimeError, engine.backward, loss)
    told["no such component"] = message_of(ValueError, engine.step, 0.1, {"backbone", "head/none"})
    told["no checkpoint"] = message_of(UserError, engine.load, folder / "none")
    engine.save(folder)
    file = folder / "states-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    told["truncated"] = message_of(UserError, engine.load, folder)
    engine.close()
    return told


@pytest.mark.parametrize("name", ["zero0", "zero3"])
def test_misuse_is_an_error_and_not_a_wrong_gradient(ranks, tmp_path, name):
    told = ranks(misuse, name, tmp_path, world_size=1)[0]
    assert "without backward" in told["step first"]
    assert "sum the losses" in told["backward twice"]
    assert "['head/none']" in told["no such component"]
    assert "not the engine's part of a checkpoint" in told["no checkpoint"]
    assert "cannot be read" in told["truncated"]


def load_into_larger(folder: Path) -> str:
    engine = make_engine("zero2", 1)
    engine.save(folder)
    engine.close()
    os.environ["MASTER_PORT"] = "0"
    init_distributed(60)
    module = torch.nn.Sequential(Toy(), torch.nn.Linear(3, 2))
    groups = [*groups_of(module[0]), ds_groups(module[1])]
    other = Engine(module, groups, small_config("zero2", 1), ADAMW)
    message = message_of(UserError, other.load, folder)
    other.close()
    return message


def ds_groups(module: torch.nn.Module):
    from pretrain.training.optimizer import ParameterGroup

    return ParameterGroup("head/other", list(module.parameters()))


def test_a_checkpoint_of_another_model_is_refused_by_the_parameter_that_is_missing(ranks, tmp_path):
    assert "another model" in ranks(load_into_larger, tmp_path, world_size=1)[0]


def reductions() -> tuple[list[float], list[float], list]:
    init_distributed(60)
    engine = make_engine("zero2")
    summed = engine.all_reduce([engine.rank + 1.0, 1e-12])
    largest = engine.all_reduce(torch.tensor([float(engine.rank)]), "max")
    facts = [engine.rank, engine.world_size, engine.device.type, engine.stage, engine.dtype]
    engine.barrier()
    engine.close()
    return summed.tolist(), largest.tolist(), facts


def test_reductions_are_in_float64_over_all_ranks(ranks):
    for rank, (summed, largest, facts) in enumerate(ranks(reductions)):
        assert summed == [3.0, 2e-12]
        assert largest == [1.0]
        assert facts == [rank, 2, "cpu", 2, torch.float32]


def join_alone() -> dict:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ["LOCAL_SIZE"] = "1"  # as the deepspeed launcher sets it
    init_distributed(77)
    # as ZeRO makes its groups: without a timeout of their own
    timeout = torch.distributed.distributed_c10d._get_default_timeout("gloo")
    found = {"timeout": timeout, "size": torch.distributed.get_world_size()}
    return found | {"shared memory": deepspeed.comm.comm.cdb.shm_comm_op}


def test_without_a_launcher_a_process_is_alone_with_our_timeout_and_without_shared_memory(ranks):
    (found,) = ranks(join_alone, world_size=1)
    assert found == {"timeout": datetime.timedelta(seconds=77), "size": 1, "shared memory": None}


def test_half_a_launchers_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        init_distributed(60)


PRIVATE = {
    1: ["averaged_gradients", "all_grad_tensors", "single_partition_of_fp32_groups", "bit16_groups", "micro_step_id"],
    3: ["grad_partitions_flat_buffer", "fp32_partitioned_groups_flat", "fp16_groups"],
}
PRIVATE_OFFLOAD = {
    2: ["cpu_offload", "accumulated_grads_in_cpu"],
    3: ["offload_optimizer"],
}


def missing_attributes(name: str) -> list[str]:
    """Names of what ds_internals reads or sets and DeepSpeed does not have; setting would go unnoticed otherwise."""
    engine = make_engine(name)
    take_step(engine, BEFORE[0], Trace())
    wanted = PRIVATE[3 if engine.stage == 3 else 1] + ["_global_grad_norm"]
    if "offload" in name:
        wanted += PRIVATE_OFFLOAD[engine.stage]
    optimizer = engine._engine.optimizer
    missing = [attribute for attribute in wanted if not hasattr(optimizer, attribute)]
    engine.close()
    return missing


@pytest.mark.parametrize("name", ["zero1", "zero2-offload", "zero3-offload"])
def test_deepspeed_still_has_the_private_attributes_that_are_set(ranks, name):
    assert ranks(missing_attributes, name) == [[], []]


def test_deepspeeds_constants_and_keys_are_still_those_we_name():
    assert MANAGED_GRADIENT_ACCUMULATION == "managed_gradient_accumulation"
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(ds_config._ZERO) <= known
    assert set(ds_config._ZERO_REFUSED) - {"mics_shard_size"} <= known
    assert set(ds_config._OFFLOAD_OPTIMIZER) <= set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert logging.getLogger("DeepSpeed") is deepspeed.utils.logger
