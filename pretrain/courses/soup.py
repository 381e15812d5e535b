"""Soups: the mean of several models' weights, and the search for which models to take (arXiv 2203.05482; of courses,
arXiv 2305.03981)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


def average(models: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each weight over models that have the same names, shapes and dtypes.

    One name at a time is read of every model. What is no floating-point number (a mask, say) is the first model's.
    """
    return {name: mean([model[name] for model in models]) for name in models[0]}


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of one shape and dtype, summed in fp64 and rounded once to their dtype; integers and
    booleans are not averaged, the first is returned."""
    first = tensors[0]
    if not first.is_floating_point():
        return first
    total = first.to(torch.float64, copy=True)  # begun with the first: zeros would lose the sign of −0
    for tensor in tensors[1:]:
        total += tensor
    return (total / len(tensors)).to(first.dtype)


@dataclass(frozen=True)
class Tasting:
    """What was found of one ingredient; scores are None where they were not asked for."""

    ingredient: int
    alone: float | None
    """Its own score."""
    together: float | None
    """The score of the greedy soup so far with it."""
    kept: bool


def greedy(alone: Sequence[float], score: Callable[[list[int]], float]) -> list[Tasting]:
    """Return the greedy search's verdict on each ingredient, best first (recipe 1 of arXiv 2203.05482).

    The ingredient with the best score is taken; each further one, in the order of their scores, is kept if the score of
    the average with it does not fall. Equal ones keep their order.

    Args:
        alone: each ingredient's score.
        score: of the average of some ingredients; asked once for each but the first.
    """
    tastings: list[Tasting] = []
    kept: list[int] = []
    best = float("-inf")
    for ingredient in sorted(range(len(alone)), key=lambda index: -alone[index]):
        together = score([*kept, ingredient]) if kept else alone[ingredient]
        tastings.append(Tasting(ingredient, alone[ingredient], together, together >= best))
        if together >= best:
            kept, best = [*kept, ingredient], together
    return tastings
