"""Windows with bursts: each objective alone for some steps, and held-out losses before and after."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from fused_objectives.philox import philox
from pretrain.errors import UserError
from pretrain.sampling.base import Measured, Wish
from pretrain.sampling.learning import LearningSampler, relative_drop


class Burst(NamedTuple):
    """Steps of a window that train one objective alone."""

    objective: str
    begin: int
    end: int
    """Steps from the window's first; ``end`` is the first step behind."""


class BurstSampler(LearningSampler):
    """Begins every window with one burst an objective, in random order, and learns from what each does to the losses.

    A window is ``config.interval_steps`` steps. The credit of an objective is the sum of the held-out losses' relative
    drops during its burst, a step of the burst. Steps behind the last burst follow the probabilities.
    """

    learned = ("losses", "credits")

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self.losses: dict[str, float] = {}
        """At the last border; empty if they were not finite."""
        self.credits: dict[str, float] = {}
        """Of the window's bursts so far."""
        needed = 2 * len(self.objectives)
        if self.burst_steps() < needed:
            raise UserError(
                f"sampler.interval_steps: {config.interval_steps} leaves {self.burst_steps()} steps for bursts of "
                f"{len(self.objectives)} objectives; {needed} are the least"
            )

    @property
    def probes(self) -> bool:
        return True

    @abstractmethod
    def burst_steps(self) -> int:
        """Return how many steps of a window are bursts."""

    @abstractmethod
    def burst_shares(self) -> Mapping[str, float]:
        """Return how the bursts share these steps; the same within a window."""

    @abstractmethod
    def conclude(self, window: int, credits: dict[str, float]) -> dict[str, dict[str, float]]:
        """Learn from the credits of a window; bursts whose losses were not finite have none."""

    def bursts(self, window: int) -> tuple[Burst, ...]:
        """Return the bursts of a window in their order, a function of (seed, window) and of what was learnt."""
        return _laid_out(self.seed, window, tuple(self.burst_shares().items()), self.burst_steps())

    def plan(self, step: int) -> dict[str, float]:
        window, offset = divmod(step, self.config.interval_steps)
        current = next((burst for burst in self.bursts(window) if offset < burst.end), None)
        return {current.objective: 1.0} if current else super().plan(step)

    def wish(self, step: int) -> Wish | None:
        return Wish.LOSSES if step % self.config.interval_steps == 0 or self._ended(step) else None

    def _ended(self, step: int) -> Burst | None:
        """Return the burst of which the step before was the last."""
        window, offset = divmod(step - 1, self.config.interval_steps)
        return next((burst for burst in self.bursts(window) if offset + 1 == burst.end), None) if step else None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        ended, before = self._ended(step), self.losses
        self.losses = dict(measured.losses) if self.finite(measured.losses) else {}
        lesson = {}
        if ended:
            if before and self.losses:
                self.credits[ended.objective] = relative_drop(before, self.losses) / (ended.end - ended.begin)
            if ended.end == self.burst_steps():
                lesson = self.conclude((step - 1) // self.config.interval_steps, self.credits)
                self.credits = {}
        return self.told(losses=measured.losses, **lesson)


@lru_cache(maxsize=64)  # asked for at every step
def _laid_out(seed: int, window: int, shares: tuple[tuple[str, float], ...], total: int) -> tuple[Burst, ...]:
    steps = apportion(dict(shares), total)
    lots = [philox(seed, "sampler bursts", window, number)[0] for number in range(len(steps))]
    order = [name for _, name in sorted(zip(lots, steps, strict=True))]
    begins = [sum(steps[name] for name in order[:number]) for number in range(len(order))]
    return tuple(Burst(name, begin, begin + steps[name]) for name, begin in zip(order, begins, strict=True))


def apportion(shares: Mapping[str, float], steps: int) -> dict[str, int]:
    """Return objective → whole steps, at least one each, in proportion to ``shares`` by the largest remainders."""
    quotas = {name: max(share * steps - 1, 0.0) for name, share in shares.items()}
    left, total = steps - len(shares), sum(quotas.values())
    quotas = {name: left * quota / total for name, quota in quotas.items()}
    whole = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: whole[name] - quotas[name])  # stable: the recipe's order
    for name in by_remainder[: left - sum(whole.values())]:
        whole[name] += 1
    return {name: 1 + number for name, number in whole.items()}
