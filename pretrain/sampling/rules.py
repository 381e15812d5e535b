"""Rule-based samplers: fixed shares in every step, or one objective a step."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from pydantic import model_validator

from fused_objectives.philox import philox, uniform
from pretrain.config import Config
from pretrain.errors import UserError, unknown


class SamplerConfig(Config):
    """Which objectives a step trains."""

    name: Literal["fixed", "uniform", "proportional", "round_robin"] = "fixed"
    """``fixed``: all of them in every step, with their shares; ``uniform`` and ``proportional``: one a step, drawn
    alike or by the shares; ``round_robin``: one a step, in turn."""
    shares: dict[str, float] = {}
    """Objective → share, for ``fixed`` and ``proportional``; scaled to sum to 1. Empty means equal shares."""

    @model_validator(mode="after")
    def _positive(self):
        if any(share < 0 for share in self.shares.values()) or (self.shares and sum(self.shares.values()) <= 0):
            raise ValueError("shares must not be negative, and one must be positive")
        if self.shares and self.name in ("uniform", "round_robin"):
            raise ValueError(f"shares mean nothing to '{self.name}'; use 'fixed' or 'proportional'")
        return self


class Sampler(ABC):
    """Decides each step's plan: objective → share. Decides the same on every rank, and after a resume."""

    mixes: ClassVar[bool] = False
    """Whether a step trains several objectives."""

    def __init__(self, probabilities: dict[str, float], seed: int):
        self._probabilities, self.seed = probabilities, seed

    def probabilities(self, step: int) -> dict[str, float]:
        """Return objective → probability (or share) at ``step``."""
        return self._probabilities

    @abstractmethod
    def plan(self, step: int) -> dict[str, float]:
        """Return objective → share for ``step``; objectives with no share are left out."""

    def state_dict(self) -> dict:
        """Return what was learnt; rules learn nothing."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027  (rules have no state)
        """Take up what was learnt."""


class FixedSampler(Sampler):
    """All objectives in every step."""

    mixes = True

    def plan(self, step: int) -> dict[str, float]:
        return {name: share for name, share in self._probabilities.items() if share > 0}


class DrawnSampler(Sampler):
    """One objective a step, drawn by its probability; a function of (seed, step)."""

    def plan(self, step: int) -> dict[str, float]:
        draw, reached = uniform(philox(self.seed, "sampler", step)[0]), 0.0
        possible = [name for name, probability in self._probabilities.items() if probability > 0]
        for name in possible:
            reached += self._probabilities[name]
            if draw < reached:
                return {name: 1.0}
        return {possible[-1]: 1.0}


class RoundRobinSampler(Sampler):
    """One objective a step, in the recipe's order."""

    def plan(self, step: int) -> dict[str, float]:
        names = list(self._probabilities)
        return {names[step % len(names)]: 1.0}


SAMPLERS: dict[str, type[Sampler]] = {
    "fixed": FixedSampler,
    "uniform": DrawnSampler,
    "proportional": DrawnSampler,
    "round_robin": RoundRobinSampler,
}


def build_sampler(config: SamplerConfig, objectives: list[str], seed: int, where: str) -> Sampler:
    """Build the sampler of a recipe; a share for an objective that the recipe lacks is a :class:`UserError`."""
    for name in config.shares:
        if name not in objectives:
            raise unknown("objective", name, objectives, f"{where}: sampler.shares")
    if config.shares and set(objectives) - set(config.shares):
        missing = sorted(set(objectives) - set(config.shares))[0]
        raise UserError(f"{where}: sampler.shares: no share for '{missing}'; give it one (0 leaves it out)")
    total = sum(config.shares.values())
    probabilities = {name: config.shares[name] / total if total else 1 / len(objectives) for name in objectives}
    return SAMPLERS[config.name](probabilities, seed)
