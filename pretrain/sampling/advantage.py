"""Credits made comparable: against the window's mean, by a moving scale, and no stronger than they can be told from
noise."""

import math
from collections.abc import Mapping
from typing import Any


class Advantage:
    """Turns each window's credits into advantages that one learning rate fits in every run.

    A credit minus the mean of its window's, over a moving root mean square of these differences, is averaged over
    windows (``decay``). An average μ with the standard error s counts as μ · max(0, 1 − (doubt · s / μ)²): one that is
    not ``doubt`` times its error is nothing, and noise moves no probability.
    """

    def __init__(self, decay: float, doubt: float):
        self.decay, self.doubt = decay, doubt
        self.scale = self.scale_weight = 0.0
        self.moments: dict[str, list[float]] = {}
        """Objective → decayed number of windows, of their squared weights, sums of differences and of squares."""

    def take(self, credits: Mapping[str, float]) -> None:
        """Take up the credits of a window; who has none keeps what it had."""
        if len(credits) < 2:
            return
        mean = math.fsum(credits.values()) / len(credits)
        differences = {name: credit - mean for name, credit in credits.items()}
        square = math.fsum(each * each for each in differences.values()) / len(differences)
        self.scale = self.decay * self.scale + square
        self.scale_weight = self.decay * self.scale_weight + 1
        if not self.scale:
            return
        spread = math.sqrt(self.scale / self.scale_weight)
        for name, difference in differences.items():
            weight, weights, first, second = self.moments.get(name, (0.0, 0.0, 0.0, 0.0))
            each = difference / spread
            self.moments[name] = [
                self.decay * weight + 1,
                self.decay**2 * weights + 1,
                self.decay * first + each,
                self.decay * second + each * each,
            ]

    def of(self, name: str) -> float:
        """Return an objective's advantage."""
        weight, weights, first, second = self.moments.get(name, (1.0, 1.0, 0.0, 0.0))
        mean, windows = first / weight, weight * weight / weights
        if windows < 3 or not mean:
            return 0.0
        error = max(second / weight - mean * mean, 0.0) / (windows - 1)
        return mean * max(0.0, 1 - self.doubt**2 * error / (mean * mean))

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken up."""
        return {
            "scale": self.scale,
            "scale_weight": self.scale_weight,
            "moments": {name: list(each) for name, each in self.moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        self.scale, self.scale_weight = state["scale"], state["scale_weight"]
        self.moments = {name: list(each) for name, each in state["moments"].items()}
