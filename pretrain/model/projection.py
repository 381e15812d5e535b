"""Losses in the place of a head's last layer, so that its logits never exist as a whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
"""``(features [n, width], weight [outputs, width], bias [outputs] or None)`` → whatever the head shall return."""


@contextmanager
def scored(projection: nn.Linear, score: Score | None) -> Iterator[None]:
    """Let ``projection`` return ``score`` of its input and its parameters instead of logits; None leaves it alone.

    The layer is called as ever, so whoever gathers its parameters for the call (ZeRO-3) does so for the score too.
    """
    if score is None:
        yield
        return
    projection.forward = lambda features: score(features, projection.weight, projection.bias)
    try:
        yield
    finally:
        del projection.forward
