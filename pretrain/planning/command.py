"""``medley plan``: whether a run fits on some GPUs, and how: ZeRO stage, micro-batch, accumulation, what it sends."""

import argparse
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

import torch

from pretrain.errors import UserError, nearest
from pretrain.planning.activations import measure, rows_together
from pretrain.planning.candidates import Candidate, Machine, candidate, micro_batches
from pretrain.planning.zero import FP32, Group, Zero, groups_of, numel
from pretrain.recipe import Recipe, load_recipe
from pretrain.training.build import Parts, build
from pretrain.training.ds_config import resolve_ds_config
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup, build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs" / "ds"
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
RESERVE = 0.1
"""Fraction of a GPU's memory that is left to the CUDA context, NCCL and the allocator's gaps; assumed, not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley plan``."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="what is trained")
    add("--gpus", required=True, type=int, metavar="N", help="of all nodes together")
    add("--gpu-memory", required=True, metavar="SIZE", help="of one GPU, such as 80GB (10⁹) or 80GiB (2³⁰)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--ds_config", metavar="FILE", help="plan with this DeepSpeed JSON only (default: each of configs/ds)")
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to override, dotted")


def run(args: argparse.Namespace) -> None:
    """Print what fits and what to start.

    Raises:
        UserError: for a recipe, a DeepSpeed JSON or a number that cannot be used, and if nothing fits.
    """
    machine = machine_of(args)
    recipe = load_recipe(args.recipe, args.overrides)
    with recipe.named_in_errors():
        zeros = {path: _zero(recipe, path, machine.gpus) for path in _paths(args.ds_config)}
        parts = build(recipe, dtype=torch.float32)
        sizes = micro_batches(recipe.training.batch_rows // machine.gpus, rows_together(parts))
    groups = optimizer_groups(parts)
    dtypes = [each for each in (torch.float32, torch.bfloat16) if each in {zero.dtype for zero in zeros.values()}]
    kept = {dtype: measure(parts, dtype) for dtype in dtypes}  # bf16 last: it leaves the model in bf16
    found = [candidate(path, zero, groups, kept[zero.dtype].values(), sizes, machine) for path, zero in zeros.items()]
    print(page(parts, groups, found, machine))
    print(recommendation(args, found, machine))


def optimizer_groups(parts: Parts) -> list[Group]:
    """Return the groups of the optimizer that a run of these parts has."""
    optimizer = parts.recipe.training.optimizer
    settings = OptimizerSettings(optimizer.name, optimizer.weight_decay, optimizer.betas, optimizer.eps)
    components = [ParameterGroup(name, params) for name, params in parts.components.items()]
    return groups_of(build_optimizer(parts.model, components, settings).param_groups)


def machine_of(args: argparse.Namespace) -> Machine:
    """Return the GPUs that the command line describes; a :class:`UserError` names the option that is wrong."""
    for option, number in (("--gpus", args.gpus), ("--gpus-per-node", args.gpus_per_node)):
        if number < 1:
            raise UserError(f"{option}: must be at least 1, not {number}")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        whole = max(1, round(args.gpus / args.gpus_per_node)) * args.gpus_per_node
        raise UserError(
            f"--gpus: {args.gpus} is not a multiple of the {args.gpus_per_node} of a node (--gpus-per-node); the "
            f"nearest that is: {whole}"
        )
    return Machine(args.gpus, args.gpus_per_node, parse_memory(args.gpu_memory) * (1 - RESERVE))


def parse_memory(text: str) -> float:
    """Return the bytes of "80GB" or "80GiB"; a :class:`UserError` gives the nearest unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or not float(match[1]):
        raise UserError(f"--gpu-memory: '{text}' is no size; write a number above 0 and a unit, such as 80GB")
    number, unit = match.groups()
    if unit not in UNITS:
        meant = {each.lower(): each for each in UNITS}.get(unit.lower()) or nearest(unit, UNITS)
        hint = f"did you mean '{number}{meant}'?" if meant else f"valid: {', '.join(UNITS)}"
        raise UserError(f"--gpu-memory: unknown unit '{unit}'; {hint}")
    return float(number) * UNITS[unit]


def page(parts: Parts, groups: Collection[Group], found: Collection[Candidate], machine: Machine) -> str:
    """Return the table of all configurations, and what holds for all of them."""
    parameters, training = numel(groups), parts.recipe.training
    names = ("weights", "gradients", "masters", "optimizer", "buffers", "activations", "update")
    names += ("total", "DeepSpeed", "host")
    lines = [
        f"{'GB a GPU':<22}" + "".join(f"{name:>12}" for name in names) + f"{'rows × steps':>14}{'sent a step':>13}"
    ]
    for each in found:
        states = each.states
        bytes_of = [states.weights, states.gradients, states.masters, states.optimizer, states.buffers]
        bytes_of += [each.activations, states.update, each.total, each.deepspeed, states.host]
        cells = "".join(f"{'–':>12}" if number is None else f"{number / 1e9:>12.3f}" for number in bytes_of)
        layout = f"{each.micro_batch_rows} × {each.accumulation}" if each.fits else "does not fit"
        lines.append(f"{each.path.name:<24}{cells}{layout:>14}{each.sent / 1e9:>13.3f}")
    lines += [
        "",
        f"model     {parameters:,} parameters",
        f"step      {training.batch_rows} rows × {parts.row_length} tokens",
        f"machine   {machine.gpus} GPUs on {machine.nodes} node(s), {machine.memory / 1e9:.1f} GB of each to be used",
        f"host      {2 * FP32 * parameters * machine.local / 1e9:.1f} GB a node while the ranks start",
    ]
    beside = [f"weigher {parts.weigher.name}"] * (parts.weigher.name != "uniform")
    beside += [f"sampler {parts.sampler.name}"] * bool(parts.sampler.probes)
    if beside:
        lines.append(f"left out  what {' and '.join(beside)} keep for their measurements")
    return "\n".join(lines)


def recommendation(args: argparse.Namespace, found: Collection[Candidate], machine: Machine) -> str:
    """Return the line to start the best configuration with.

    Raises:
        UserError: if none fits; says by how much, and what to change.
    """
    fitting = [each for each in found if each.fits]
    if not fitting:
        least = min(found, key=lambda each: each.total)
        raise UserError(
            f"--gpu-memory: nothing fits into {machine.memory / 1e9:.3g} GB: with {least.path.name} and micro-batches "
            f"of {least.micro_batch_rows} rows a GPU needs {least.total / 1e9:.3g} GB, "
            f"{(least.total - machine.memory) / 1e9:.3g} GB more; {_remedy(least, args)}"
        )
    best = min(fitting, key=lambda each: each.preference)
    path = os.path.relpath(best.path)
    words = ["--ds_config", path if not path.startswith("..") else str(best.path), "--config", args.recipe]
    words += [*args.overrides, f"training.micro_batch_rows={best.micro_batch_rows}"]
    return f"\nrecommended: launch/train.py {shlex.join(words)}"


def _remedy(least: Candidate, args: argparse.Namespace) -> str:
    if least.activations > least.total - least.activations:
        return "set model.activation_checkpointing=true or lower data.row_length"
    if args.ds_config:
        return "leave --ds_config out to compare stages, or take more GPUs"
    if least.states.buffers > least.states.kept:
        return "lower reduce_bucket_size and stage3_prefetch_bucket_size in the DeepSpeed JSON"
    return "take more GPUs or a smaller model"


def _paths(ds_config: str | None) -> list[Path]:
    return [Path(ds_config)] if ds_config else sorted(each for each in CONFIGS.glob("zero*.json"))


def _zero(recipe: Recipe, path: Path, gpus: int) -> Zero:
    config = resolve_ds_config(
        path,
        micro_batch_rows=1,  # the largest that fits is what is asked for
        batch_rows=recipe.training.batch_rows,
        world_size=gpus,
        gradient_clipping=recipe.training.gradient_clipping,
        device_type="cuda",
    )
    return Zero.of(config)
