"""A trainer in this process, for benchmarks that time its steps."""

from pathlib import Path

import torch

from pretrain.recipe import Recipe
from pretrain.training.build import Parts, build, device_type
from pretrain.training.ds_config import resolve_ds_config
from pretrain.training.engine import Engine, init_distributed
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup
from pretrain.training.stop import StopRequest
from pretrain.training.trainer import Trainer


def resolved(recipe: Recipe, ds_config: Path) -> tuple[dict, torch.dtype]:
    """Return the DeepSpeed configuration of a run on one rank, and the type of its weights."""
    config = resolve_ds_config(
        ds_config,
        micro_batch_rows=recipe.training.micro_batch_rows,
        batch_rows=recipe.training.batch_rows,
        world_size=1,
        gradient_clipping=recipe.training.gradient_clipping,
        device_type=device_type(),
    )
    return config, torch.bfloat16 if config["bf16"]["enabled"] else torch.float32


def open_trainer(parts: Parts, ds_config: dict) -> Trainer:
    """Return a trainer that has done no step; ``trainer.engine.close()`` ends it."""
    optimizer = parts.recipe.training.optimizer
    settings = OptimizerSettings(optimizer.name, optimizer.weight_decay, optimizer.betas, optimizer.eps)
    groups = [ParameterGroup(name, parameters) for name, parameters in parts.components.items()]
    init_distributed(600)
    return Trainer(parts, Engine(parts.model, groups, ds_config, settings), StopRequest())


def build_trainer(recipe: Recipe, ds_config: Path) -> Trainer:
    """Return a trainer of a recipe."""
    config, dtype = resolved(recipe, ds_config)
    return open_trainer(build(recipe, dtype=dtype), config)
