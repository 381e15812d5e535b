"""Activations: the most that a forward takes, measured on micro-batches of one and of two units of rows.

The ops of corruption and losses depend on the data, so that the measurement is a real forward, on the CPU; whatever
differs there from a GPU and matters is done as a GPU does it. It is linear in the rows, with what the vocabulary head
keeps of its weights' gradient as the constant.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.data.batch import Batch
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.planning.live import LiveTensors
from pretrain.training.build import Parts
from pretrain.training.dry_run import largest_batch


@dataclass(frozen=True)
class Line:
    """Bytes by rows."""

    constant: float
    per_row: float

    def at(self, rows: int) -> float:
        return self.constant + self.per_row * rows


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-step takes, by its rows: the most of its forward, and what that leaves behind for the
    backward."""

    forward: Line
    backward: Line

    def at(self, rows: int) -> float:
        """Return the most of both."""
        return max(self.forward.at(rows), self.backward.at(rows))


class AsOnGpu(TorchFunctionMode):
    """Lets attention and dropout keep on a CPU what they keep on a GPU.

    The CPU's attention has no fused kernel with dropout and keeps the scores of all pairs, and ours runs in fp32 there;
    its dropout keeps a number for each element, a GPU's a byte.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = [each.to(self.dtype) for each in args[:3]] + list(args[3:])
        elif function is F.dropout:
            return _dropout(*args, **kwargs)
        return function(*args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


def forward_bytes(
    model: MultiObjectiveModel, batch: Batch, names: Iterable[str], attention: torch.dtype
) -> tuple[int, int]:
    """Return the bytes that one forward of objectives together takes at the most and those it leaves behind, weights
    left out; ``attention`` is the type that it is computed in."""
    names = list(names)
    views = {name: model.objectives[name].corrupt(batch, progress=0.0) for name in names}
    scales = {term: 1.0 for name in names for term in model.objectives[name].terms}
    with AsOnGpu(attention), LiveTensors(besides=[*model.parameters(), *model.buffers()]) as live:
        outputs = model(views, scales)
        most, left = live.most(), live.now()
    del outputs
    return most, left


def measure(parts: Parts, dtype: torch.dtype, attention: torch.dtype | None = None) -> dict[str, Activations]:
    """Return the activations of each plan the sampler can make, by the names of its objectives.

    The model of ``parts`` is left in ``dtype``, in which a GPU computes the attention too; a CPU does so in
    ``attention=torch.float32``. With activation checkpointing, the activations of the one layer that
    the backward has computed anew are part of the backward's.
    """
    model = parts.model.to(dtype)
    model.train()
    names = list(model.objectives)
    plans = [names] if parts.sampler.mixes else [[name] for name in names]
    return {" + ".join(plan): _activations(parts, plan, attention or dtype) for plan in plans}


def rows_together(parts: Parts) -> int:
    """Return the rows of which a micro-batch must be a multiple."""
    return math.lcm(*(objective.rows_together for objective in parts.model.objectives.values()))


def _activations(parts: Parts, plan: list[str], attention: torch.dtype) -> Activations:
    found = _fit(parts, plan, attention)
    layers = [layer for layer in parts.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    recomputed = [layer for layer in layers if layer.gradient_checkpointing]
    if not recomputed:
        return found
    for layer in recomputed:
        layer.gradient_checkpointing = False
    whole = _fit(parts, plan, attention).backward
    for layer in recomputed:
        layer.gradient_checkpointing = True
    left = found.backward
    one_layer = (whole.per_row - left.per_row) / len(recomputed)
    return Activations(found.forward, Line(left.constant, left.per_row + one_layer))


def _fit(parts: Parts, plan: list[str], attention: torch.dtype) -> Activations:
    """Measure micro-batches of one and of two units; where rows are packed, of rows as short as the longest sample."""
    unit, longest = rows_together(parts), parts.store.max_length
    length = longest if parts.recipe.data.packing else parts.row_length
    one, two = (forward_bytes(parts.model, _batch(parts, times * unit, length), plan, attention) for times in (1, 2))

    def line(first: int, second: int) -> Line:
        per_unit = second - first
        return Line(max(0, first - per_unit), per_unit / unit * parts.row_length / length)

    return Activations(*(line(first, second) for first, second in zip(one, two, strict=True)))


def _batch(parts: Parts, rows: int, length: int) -> Batch:
    training = parts.recipe.training.model_copy(update={"micro_batch_rows": rows})
    recipe = parts.recipe.model_copy(update={"training": training})
    return largest_batch(replace(parts, recipe=recipe, row_length=length))
