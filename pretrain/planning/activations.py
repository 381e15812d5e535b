"""Activations: what a forward keeps for its backward, measured on micro-batches of one and of two units of rows.

The ops of corruption and losses depend on the data, so that the measurement is a real forward, on the CPU; whatever
differs there from a GPU and matters is done as a GPU does it. What is kept is linear in the rows, with what the
vocabulary head keeps of its weights' gradient as the constant.
"""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.data.batch import Batch
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.training.build import Parts
from pretrain.training.dry_run import largest_batch


@dataclass(frozen=True)
class Line:
    """Bytes that a micro-step keeps, by its rows."""

    constant: float
    per_row: float

    def at(self, rows: int) -> float:
        return self.constant + self.per_row * rows


class SavedTensors:
    """Counts the bytes that are kept for a backward while it is entered: each storage once, weights left out."""

    def __init__(self, model: torch.nn.Module):
        kept = [*model.parameters(), *model.buffers()]
        self._of_the_model = {each.untyped_storage().data_ptr() for each in kept}
        self._sizes: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._of_the_model:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


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


def saved_bytes(model: MultiObjectiveModel, batch: Batch, names: Iterable[str], dtype: torch.dtype) -> int:
    """Return what one forward of objectives together keeps of its activations, in bytes."""
    names = list(names)
    views = {name: model.objectives[name].corrupt(batch, progress=0.0) for name in names}
    scales = {term: 1.0 for name in names for term in model.objectives[name].terms}
    with ExitStack() as stack:
        saved = stack.enter_context(SavedTensors(model))
        stack.enter_context(AsOnGpu(dtype))
        loss, _ = model(views, scales)
    del loss
    return saved.bytes


def measure(parts: Parts, dtype: torch.dtype) -> dict[str, Line]:
    """Return a line for each plan the sampler can make, by the names of its objectives.

    The model of ``parts`` is left in ``dtype``. With activation checkpointing, the activations of the one layer that
    the backward has computed anew are part of the line.
    """
    model = parts.model.to(dtype)
    model.train()
    names = list(model.objectives)
    plans = [names] if parts.sampler.mixes else [[name] for name in names]
    return {" + ".join(plan): _line(parts, plan, dtype) for plan in plans}


def rows_together(parts: Parts) -> int:
    """Return the rows of which a micro-batch must be a multiple."""
    return math.lcm(*(objective.rows_together for objective in parts.model.objectives.values()))


def _line(parts: Parts, plan: list[str], dtype: torch.dtype) -> Line:
    line = _fit(parts, plan, dtype)
    layers = [layer for layer in parts.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    recomputed = [layer for layer in layers if layer.gradient_checkpointing]
    if not recomputed:
        return line
    for layer in recomputed:
        layer.gradient_checkpointing = False
    whole = _fit(parts, plan, dtype)
    for layer in recomputed:
        layer.gradient_checkpointing = True
    return Line(line.constant, line.per_row + (whole.per_row - line.per_row) / len(recomputed))


def _fit(parts: Parts, plan: list[str], dtype: torch.dtype) -> Line:
    """Measure micro-batches of one and of two units; where rows are packed, of rows as short as the longest sample."""
    unit, longest = rows_together(parts), parts.store.max_length
    length = longest if parts.recipe.data.packing else parts.row_length
    sizes = [saved_bytes(parts.model, _batch(parts, times * unit, length), plan, dtype) for times in (1, 2)]
    per_unit = sizes[1] - sizes[0]
    return Line(max(0, sizes[0] - per_unit), per_unit / unit * parts.row_length / length)


def _batch(parts: Parts, rows: int, length: int) -> Batch:
    training = parts.recipe.training.model_copy(update={"micro_batch_rows": rows})
    recipe = parts.recipe.model_copy(update={"training": training})
    return largest_batch(replace(parts, recipe=recipe, row_length=length))
