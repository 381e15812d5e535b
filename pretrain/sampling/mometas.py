"""MOMETAS: an objective sampler learnt from held-out losses (arXiv 2210.10293), its rule and ours."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from fused_objectives.philox import philox, uniform
from pretrain.errors import UserError
from pretrain.sampling.advantage import Advantage
from pretrain.sampling.base import Measured, ProbingConfig, Sampler, Wish, register
from pretrain.sampling.bursts import BurstSampler
from pretrain.sampling.learning import LearningSampler, checked_floor

DECAY, DOUBT = 0.95, 2.6
"""Of :class:`Advantage`."""


class MometasConfig(ProbingConfig):
    """Keys of ``mometas`` and ``random_reward``."""

    reward: Literal["credit", "paper"] = "credit"
    """``paper``: one reward for all steps of a window, as its authors have it; ``credit``: one for each objective."""
    credit: Literal["bursts", "gradients"] | None = None
    """Where credits come from: the held-out losses before and after a burst of the objective, or the agreement of its
    gradient with that of all held-out losses; null: ``bursts``, and ``gradients`` with ``mode: mix``."""
    interval_steps: int = Field(100, ge=1)
    """Steps between updates (k)."""
    learning_rate: float | None = Field(None, gt=0)
    """Of the logits, an update; null: 0.3, with ``reward: paper`` 0.1."""
    entropy: float | None = Field(None, ge=0)
    """Weight of the entropy (γ); null: 0.3, with ``reward: paper`` 2."""
    floor: float | None = Field(None, ge=0, lt=1)
    """Smallest probability; null: a tenth of the uniform one."""


@register
class MometasSampler(Sampler):
    """Learns from held-out losses which objectives to train; ``reward`` and ``credit`` say how."""

    name = "mometas"
    Config = MometasConfig

    @classmethod
    def chosen_by(cls, config: MometasConfig) -> type[Sampler]:
        if config.reward == "paper":
            return PaperMometas
        credit = config.credit or ("gradients" if config.mode == "mix" else "bursts")
        return BurstMometas if credit == "bursts" else GradientMometas


@register
class RandomRewardSampler(MometasSampler):
    """The control: measures all that ``mometas`` does, and learns from noise of the same variance."""

    name = "random_reward"


class PaperMometas(LearningSampler):
    """The authors' rule: every k steps φ ← φ − η ∇J, J = Σ_a −R log p_a − γ H(p) over the k objectives a just trained.

    R = Σ_o max(r_o, −1), r_o the relative drop of held-out loss o since the last update, 0 if the loss moved by no more
    than 1e-3; held-out text and corruption are new at every update. From their code; H enters once an update.
    """

    modes = ("draw",)
    learned = ("losses", "squares", "updates")

    def __init__(self, config: MometasConfig, objectives, seed, steps):
        for key in ("credit", "floor"):
            if getattr(config, key) is not None:
                raise UserError(f"sampler.{key}: means nothing with 'reward: paper'; leave the key out")
        super().__init__(config, objectives, seed, steps)
        self.logits = dict.fromkeys(self.objectives, 1.0)
        self.learning_rate = config.learning_rate or 0.1
        self.entropy = 2.0 if config.entropy is None else config.entropy
        self.losses: dict[str, float] = {}
        self.squares, self.updates = 0.0, 0
        """Sum of the squared rewards, and their number."""

    @property
    def probes(self) -> bool:
        return True

    def wish(self, step: int) -> Wish | None:
        return Wish.FRESH_LOSSES if step % self.config.interval_steps == 0 else None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        before, finite = self.losses, self.finite(measured.losses)
        self.losses = dict(measured.losses) if finite else before
        if not (before and finite):
            return self.told(losses=measured.losses)
        drops = {name: paper_drop(before[name], measured.losses[name]) for name in before}
        reward = math.fsum(drops.values())
        if self.name == RandomRewardSampler.name:
            self.squares, self.updates = self.squares + reward * reward, self.updates + 1
            reward = math.sqrt(self.squares / self.updates) * gaussian(self.seed, step, 0)
        trained = dict.fromkeys(self.objectives, 0)
        for past in range(step - self.config.interval_steps, step):
            trained[next(iter(self.plan(past)))] += 1
        slope = paper_gradient(self.probabilities(step), trained, reward, self.entropy)
        for name in self.logits:
            self.logits[name] -= self.learning_rate * slope[name]
        return self.told(losses=measured.losses, rewards=drops)


def paper_drop(before: float, after: float) -> float:
    """Return a loss's part of the reward."""
    drop = before - after
    return max(drop / before, -1.0) if abs(drop) > 1e-3 else 0.0


def paper_gradient(
    probabilities: Mapping[str, float], trained: Mapping[str, int], reward: float, entropy: float
) -> dict[str, float]:
    """Return ∇J of the logits: −R (n_j − k p_j) + γ p_j (log p_j + H(p)), with n_j of k steps on objective j."""
    steps = sum(trained.values())
    logs = {name: math.log(p) if p > 0 else 0.0 for name, p in probabilities.items()}
    height = -math.fsum(p * logs[name] for name, p in probabilities.items())
    return {
        name: -reward * (trained[name] - steps * p) + entropy * p * (logs[name] + height)
        for name, p in probabilities.items()
    }


class CreditMometas(LearningSampler):
    """Ours: mirror ascent on Σ_j p_j â_j + γ H(p), where â are the credits as advantages (:class:`Advantage`):
    φ_j ← φ_j + η (â_j − γ φ_j). On a useless signal φ decays to 0 and p to the uniform distribution."""

    def __init__(self, config: MometasConfig, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        self.floor = checked_floor(config.floor, len(self.objectives), 0.1)
        self.learning_rate = config.learning_rate or 0.3
        self.entropy = 0.3 if config.entropy is None else config.entropy
        self.advantage = Advantage(DECAY, DOUBT)

    @property
    def probes(self) -> bool:
        return True

    def climb(self, window: int, credits: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Take the step that a window's credits call for; return what the log shall tell."""
        random = self.name == RandomRewardSampler.name
        if len(credits) == len(self.objectives):
            self.advantage.take(noise_like(credits, self.seed, window) if random else credits)
        advantages = self.advantage.advantages()
        for name, advantage in advantages.items():
            self.logits[name] += self.learning_rate * (advantage - self.entropy * self.logits[name])
        return {"credits": credits, "advantages": advantages}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"advantage": self.advantage.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.advantage.load_state_dict(state["advantage"])


class BurstMometas(CreditMometas, BurstSampler):
    """Credit of an objective: what its burst does to the held-out losses; every step belongs to a burst."""

    modes = ("draw",)

    def burst_steps(self) -> int:
        return self.config.interval_steps

    def burst_shares(self) -> Mapping[str, float]:
        return self.probabilities(0)

    def conclude(self, window: int, credits: dict[str, float]) -> dict[str, dict[str, float]]:
        return self.climb(window, credits)


class GradientMometas(CreditMometas):
    """Credit of an objective: ⟨d, g⟩ / ‖g‖ of its gradient g and that of all relative held-out losses, d.

    Adam's step hardly depends on the gradient's size, so neither does the credit.
    """

    def wish(self, step: int) -> Wish | None:
        return Wish.CREDITS if step % self.config.interval_steps == 0 else None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        lesson = {}
        if self.finite(measured.products, measured.squares):
            credits = {
                name: product / math.sqrt(max(measured.squares[name], 1e-30))
                for name, product in measured.products.items()
            }
            lesson = self.climb(step // self.config.interval_steps, credits)
        return self.told(losses=measured.losses, **lesson)


def noise_like(credits: Mapping[str, float], seed: int, window: int) -> dict[str, float]:
    """Return normal numbers of the variance that ``credits`` have among each other, a function of (seed, window)."""
    mean = math.fsum(credits.values()) / max(len(credits), 1)
    spread = math.sqrt(math.fsum((credit - mean) ** 2 for credit in credits.values()) / max(len(credits), 1))
    return {name: spread * gaussian(seed, window, number) for number, name in enumerate(sorted(credits))}


def gaussian(seed: int, *counter: int) -> float:
    """Return a standard normal number, a function of (seed, counter)."""
    first, second, *_ = philox(seed, "sampler noise", *counter)
    return math.sqrt(-2 * math.log(1 - uniform(first))) * math.cos(2 * math.pi * uniform(second))
