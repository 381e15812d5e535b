"""What samplers that learn have in common: a state, a softmax, and numbers that are not finite."""

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pretrain.errors import UserError
from pretrain.sampling.base import Sampler


class LearningSampler(Sampler):
    """Learns the logits of its distribution. Numbers that are not finite are ignored and counted."""

    learned: ClassVar[tuple[str, ...]] = ()
    """Attributes that are its state besides ``logits``; as JSON holds them."""
    floor = 0.0
    """Smallest probability of an objective."""

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self.logits = dict.fromkeys(self.objectives, 0.0)
        self.ignored = dict.fromkeys(self.objectives, 0)

    def probabilities(self, step: int) -> dict[str, float]:
        return softmax(self.logits, self.floor)

    def finite(self, *numbers: Mapping[str, float]) -> bool:
        """Return whether all of objective → number are finite; count an objective of which they are not."""
        lost = {name for each in numbers for name, number in each.items() if not math.isfinite(number)}
        for name in lost:
            self.ignored[name] += 1
        return not lost

    def told(self, **what: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return what the log shall tell; and what was ignored since the start of the run, if anything was."""
        what["ignored"] = {name: float(count) for name, count in self.ignored.items() if count}
        finite = {of: {name: each for name, each in its.items() if math.isfinite(each)} for of, its in what.items()}
        return {of: its for of, its in finite.items() if its}

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in ("logits", "ignored", *self.learned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("logits", "ignored", *self.learned):
            setattr(self, name, copy.deepcopy(state[name]))


def softmax(logits: Mapping[str, float], floor: float = 0.0) -> dict[str, float]:
    """Return (1 − m · floor) · softmax(logits) + floor of m objectives."""
    largest = max(logits.values())
    powers = {name: math.exp(logit - largest) for name, logit in logits.items()}
    left, total = 1 - len(logits) * floor, math.fsum(powers.values())
    return {name: left * power / total + floor for name, power in powers.items()}


def checked_floor(floor: float | None, objectives: int, default: float) -> float:
    """Return the smallest probability that a configuration names; without one ``default`` of the uniform one.

    Raises:
        UserError: if the objectives' floors add up to 1 or more.
    """
    if floor is None:
        return default / objectives
    if objectives > 1 and floor * objectives >= 1:
        raise UserError(f"sampler.floor: {floor} times {objectives} objectives leaves nothing to learn; lower it")
    return floor


def relative_drop(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return Σ over the objectives of the drop of the loss as a part of what it was."""
    return math.fsum((before[name] - after[name]) / max(abs(before[name]), 1e-8) for name in before)
