"""Joining and leaving the other ranks: one process group, with time limits that DeepSpeed's own groups keep as well."""

import logging
import os
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from pretrain.errors import UserError
from pretrain.training.ds_internals import avoid_shared_memory, forget_process_group
from pretrain.training.start import free_port

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(timeout_seconds: float) -> None:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    With none of them set, the process is alone: rank 0 of 1 on a free port. gloo on the CPU, NCCL on GPUs.
    ``timeout_seconds`` limits every wait for another rank, also in the groups DeepSpeed makes later; it must exceed the
    longest honest wait (saving, the first compilation). Does nothing when the process has joined already.

    Raises:
        UserError: if some of the variables are set and others are not.
    """
    if torch.distributed.is_initialized():
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if {"RANK", "WORLD_SIZE"} <= set(missing):
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    elif missing:
        raise UserError(f"environment: {', '.join(missing)} not set; start with deepspeed, torchrun or srun")
    avoid_shared_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    timeout = timedelta(seconds=timeout_seconds)
    # ZeRO makes its groups without a timeout, so the defaults must be ours; else a cut link hangs for 15 minutes.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def shutdown_distributed() -> None:
    """Leave the process group, so that the process ends without a warning or can join another one."""
    if torch.distributed.is_initialized():
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # also drops the groups DeepSpeed has cached
        else:
            torch.distributed.destroy_process_group()
    forget_process_group()
