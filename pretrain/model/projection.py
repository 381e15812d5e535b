"""Losses in the place of a head's last layer, so that its logits never exist as a whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
"""``(features [n, width], weight [outputs, width], bias [outputs] or None)`` → whatever the head shall return."""


@dataclass(frozen=True)
class Shifted:
    """A score of logits to which the head adds something."""

    score: Score
    shift: torch.Tensor
    """``[outputs]``."""

    def __call__(self, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> Any:
        return self.score(features, weight, self.shifted(bias), **options)

    def shifted(self, bias: torch.Tensor | None) -> torch.Tensor:
        """Return all that is added to the logits, where the layer adds ``bias``."""
        return self.shift if bias is None else self.shift + bias


@contextmanager
def scored(projection: nn.Linear, score: Score | None) -> Iterator[None]:
    """Let ``projection`` return ``score`` of its input and its parameters instead of logits; None leaves it alone.

    The layer is called as ever, so whoever gathers its parameters for the call (ZeRO-3) does so for the score too.
    Whoever watches the layer, by a ``forward`` with a method ``scored``, is asked to apply the score.
    """
    if score is None:
        yield
        return
    watcher = vars(projection).get("forward")
    if watcher is None:
        projection.forward = lambda features: score(features, projection.weight, projection.bias)
    else:
        projection.forward = partial(watcher.scored, score)
    try:
        yield
    finally:
        if watcher is None:
            del projection.forward
        else:
            projection.forward = watcher
