"""Target places: the few tokens of a batch that an objective predicts, brought together so that only they meet the
vocabulary.

On a GPU nothing may depend on how many there are, or the host would have to wait: the places come in an array of a
fixed capacity, and their number stays on the device.
"""

import math
from typing import NamedTuple

import torch

IGNORED = -100
"""Label of a token that is no target."""


class Targets(NamedTuple):
    """Which tokens are targets."""

    places: torch.Tensor
    """``[K]`` int64: places of the targets in ascending order, −1 behind the last."""
    slots: torch.Tensor
    """``[N]`` int64: each token's index in ``places``, −1 if it is no target."""
    count: torch.Tensor
    """``[]`` int64: number of targets; more than K if the capacity did not suffice."""

    @property
    def overflow(self) -> torch.Tensor:
        """``[]`` float32: NaN if targets were left out, else 0. Added to a loss, it makes the step be skipped and
        counted instead of losing targets silently."""
        return torch.where(self.count > len(self.places), torch.nan, 0.0)

    def take(self, values: torch.Tensor, padding: float | None = None) -> torch.Tensor:
        """Return ``values [N, ...]`` at the places, ``[K, ...]``; behind the last target ``padding``, or anything."""
        taken = values.index_select(0, self.places.clamp(min=0))
        return taken if padding is None else torch.where(self.places < 0, padding, taken)


def compact(is_target: torch.Tensor, capacity: int | None = None) -> Targets:
    """Bring target places together, in their order.

    Args:
        is_target: ``[N]`` bool.
        capacity: K; None takes the exact number on the CPU and N on a GPU, where asking would make the host wait.
    """
    total = len(is_target)
    running = is_target.cumsum(0)
    count = running[-1] if total else running.sum()
    if capacity is None:
        capacity = total if is_target.is_cuda else int(count)
    slots = torch.where(is_target & (running <= capacity), running - 1, -1)
    places = torch.full((capacity + 1,), -1, dtype=torch.int64, device=is_target.device)
    tokens = torch.arange(total, device=is_target.device)
    places = places.scatter(0, torch.where(slots < 0, capacity, slots), tokens)
    return Targets(places[:capacity], slots, count)


def capacity_for(tokens: int, rate: float, together: int = 1, multiple: int = 128) -> int:
    """Return a capacity that randomly chosen targets exceed with a probability below 10⁻¹².

    Args:
        tokens: how many may be chosen.
        rate: probability of each.
        together: how many are chosen or left together at most, such as the tokens of a word; 1 if independently.
        multiple: the capacity is rounded up to one of it, and never above ``tokens``.

    Raises:
        ValueError: if the rate is no probability.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: {rate} is not within 0 and 1")
    spread = 8 * math.sqrt(tokens * rate * (1 - rate) * together)
    return min(tokens, math.ceil((tokens * rate + spread + 8 * together) / multiple) * multiple)
