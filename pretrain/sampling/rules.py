"""Rule-based samplers: their shares are known before the run."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from pretrain.config import Config
from pretrain.sampling.base import Sampler, SamplerConfig, mixture, register


def _usable(shares: dict[str, float]) -> dict[str, float]:
    if any(share < 0 for share in shares.values()) or (shares and sum(shares.values()) <= 0):
        raise ValueError("shares must not be negative, and one must be positive")
    return shares


Shares = Annotated[dict[str, float], AfterValidator(_usable)]
"""Objective → share; scaled to sum to 1. Empty means equal shares."""


class SharesConfig(SamplerConfig):
    """Keys of ``fixed`` and ``proportional``."""

    shares: Shares = {}
    """Objective → share; scaled to sum to 1. Empty means equal shares."""


@register
class FixedSampler(Sampler):
    """All objectives in every step, with the same shares."""

    name = "fixed"
    Config = SharesConfig
    modes = ("mix", "draw")

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self._shares = mixture(config.shares, objectives, "sampler.shares")

    def probabilities(self, step: int) -> dict[str, float]:
        return self._shares


@register
class ProportionalSampler(FixedSampler):
    """One objective a step, drawn by its share."""

    name = "proportional"
    modes = ("draw", "mix")


@register
class UniformSampler(Sampler):
    """One objective a step, all alike."""

    name = "uniform"

    def probabilities(self, step: int) -> dict[str, float]:
        return mixture({}, self.objectives, "sampler")


@register
class RoundRobinSampler(UniformSampler):
    """One objective a step, in the recipe's order."""

    name = "round_robin"
    modes = ("draw",)

    def plan(self, step: int) -> dict[str, float]:
        return {self.objectives[step % len(self.objectives)]: 1.0}


class AnnealedConfig(SamplerConfig):
    """Keys of ``annealed``."""

    model_config = ConfigDict(populate_by_name=True)

    start: Shares = Field({}, alias="from")
    """Objective → share at the start of the run."""
    end: Shares = Field(..., alias="to")
    """Objective → share at its end."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How it goes from the one to the other."""


@register
class AnnealedSampler(Sampler):
    """From one mixture to another over the run."""

    name = "annealed"
    Config = AnnealedConfig

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self._start = mixture(config.start, objectives, "sampler.from")
        self._end = mixture(config.end, objectives, "sampler.to")

    def probabilities(self, step: int) -> dict[str, float]:
        done = min(step / max(1, self.steps - 1), 1.0)
        if self.config.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return {name: (1 - done) * self._start[name] + done * self._end[name] for name in self.objectives}


class PhaseConfig(Config):
    """One of the phases of ``alternating``."""

    shares: Shares
    """Objective → share within the phase; who is not named has none."""
    steps: int = Field(..., ge=1)


class AlternatingConfig(SamplerConfig):
    """Keys of ``alternating``."""

    phases: list[PhaseConfig] = Field(..., min_length=1)
    """One after another; after the last the first begins again."""


@register
class AlternatingSampler(Sampler):
    """Phases of a given length, each with a mixture of its own, again and again."""

    name = "alternating"
    Config = AlternatingConfig

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        nothing = dict.fromkeys(objectives, 0.0)
        self._phases = [
            (phase.steps, mixture(nothing | phase.shares, objectives, f"sampler.phases.{number}.shares"))
            for number, phase in enumerate(config.phases)
        ]

    def probabilities(self, step: int) -> dict[str, float]:
        left = step % sum(steps for steps, _ in self._phases)
        phase = 0
        while left >= self._phases[phase][0]:
            left, phase = left - self._phases[phase][0], phase + 1
        return self._phases[phase][1]
