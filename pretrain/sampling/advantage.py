"""Credits made comparable: against the window's mean, by the window's spread, and no stronger than windows agree."""

import math
from collections.abc import Mapping
from typing import Any


class Advantage:
    """Turns each window's credits into advantages that one learning rate fits in every run.

    Credits minus their mean, over their root mean square, are averaged over windows (``decay``) and one window of
    nothing: ā, of n effective windows. Agreement is S = mean ā², 1 if all windows rank alike, and
    F = (n − 1) S / (1 − S) is about 1 if the credits are noise. An advantage is ā · max(0, 1 − q / F), shrunk as James
    and Stein shrink means; q is what F of noise stays below with the normal probability of ``doubt`` standard
    deviations (Wilson and Hilferty's quantile of χ² / (m − 1) of m objectives). So noise moves next to nothing.
    """

    def __init__(self, decay: float, doubt: float):
        self.decay, self.doubt = decay, doubt
        self.windows = 0
        self.sums: dict[str, float] = {}

    def take(self, credits: Mapping[str, float]) -> None:
        """Take up the credits of a window."""
        mean = math.fsum(credits.values()) / len(credits)
        spread = math.sqrt(math.fsum((credit - mean) ** 2 for credit in credits.values()) / len(credits))
        if spread > 1e-12 * max(map(abs, credits.values())):  # else they differ by rounding
            self.windows += 1
            for name, credit in credits.items():
                self.sums[name] = self.decay * self.sums.get(name, 0.0) + (credit - mean) / spread

    def advantages(self) -> dict[str, float]:
        """Return objective → advantage; empty before the first window."""
        weight, squares = ((1 - decay**self.windows) / (1 - decay) for decay in (self.decay, self.decay**2))
        means = {name: total / (weight + 1) for name, total in self.sums.items()}
        agreement = math.fsum(mean * mean for mean in means.values()) / max(len(means), 1)
        if self.windows < 2 or not agreement:
            return dict.fromkeys(means, 0.0)
        width = 2 / (9 * (len(means) - 1))
        bound = (1 - width + self.doubt * math.sqrt(width)) ** 3
        noise = (1 - agreement) / ((weight * weight / squares - 1) * agreement)
        return {name: mean * max(0.0, 1 - bound * noise) for name, mean in means.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken up."""
        return {"windows": self.windows, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        self.windows, self.sums = state["windows"], dict(state["sums"])
