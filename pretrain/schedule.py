"""The learning rate as a function of the step."""

import math
from typing import Literal

from pydantic import Field

from pretrain.config import Config


class ScheduleConfig(Config):
    """Warm-up, then a shape, down to a fraction of the peak."""

    shape: Literal["constant", "linear", "cosine", "trapezoid"] = "linear"
    """What follows the warm-up; ``trapezoid`` stays at the peak and falls linearly over the last ``cooldown`` of the
    run."""
    warmup: float = Field(0.06, ge=0, le=1)
    """Fraction of the run's steps over which the rate rises linearly from 0."""
    cooldown: float = Field(0.2, gt=0, le=1)
    """Fraction of the run's steps over which ``trapezoid`` falls."""
    floor: float = Field(0.0, ge=0, le=1)
    """What the rate falls towards, as a fraction of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on the peak for ``step`` (0-based) of ``steps``; no step trains with rate 0."""
        warmup_steps = math.ceil(self.warmup * steps)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        if self.shape == "linear":
            left = 1 - done
        elif self.shape == "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        elif self.shape == "trapezoid":
            left = min(1.0, (steps - step) / max(1, math.ceil(self.cooldown * steps)))
        else:
            return 1.0
        return self.floor + (1 - self.floor) * left
