"""What every sampler is, and the registry: which objectives a step trains, with which shares.

To add a sampler: give the class a ``name`` and a ``Config``, register it with ``@register`` and import its file in
``__init__.py``. The tests over the registry then cover it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field

from fused_objectives.philox import philox, uniform
from pretrain.config import Config, parse_named
from pretrain.errors import UserError, unknown


class Wish(StrEnum):
    """What a sampler wants measured before it plans a step, on held-out rows: new ones each time if it is not said."""

    LOSSES = "losses"
    """Every objective's loss, on the same rows and under the same corruption every time."""
    FRESH_LOSSES = "fresh losses"
    """Every objective's loss, under new corruption."""
    CREDITS = "credits"
    """How each objective's gradient agrees with that of all relative losses together."""
    NOISE = "noise"
    """Size and noise of each objective's gradient."""
    STEP = "step"
    """How each objective's gradient on the step's own batch agrees with that of the end task on its dev split; measured
    within the step, which trains all objectives."""


@dataclass(frozen=True)
class Measured:
    """What was measured; objective → number. The same bits on every rank."""

    losses: dict[str, float] = field(default_factory=dict)
    """Means over targets."""
    products: dict[str, float] = field(default_factory=dict)
    """⟨d, g⟩ of the objective's gradient g with the direction d that the wish names."""
    squares: dict[str, float] = field(default_factory=dict)
    """‖g‖², for :attr:`Wish.NOISE` without what noise adds to it."""
    noise: dict[str, float] = field(default_factory=dict)
    """Variance of the gradient of a training batch, summed over parameters."""
    direction_square: float = 0.0
    """‖d‖²."""


class SamplerConfig(Config):
    """Keys that every sampler has."""

    name: str = "fixed"
    mode: Literal["draw", "mix"] | None = None
    """``draw`` one objective a step by its probability, or ``mix`` all in every step by shares that are those
    probabilities; null: what the sampler is known for."""


class ProbingConfig(SamplerConfig):
    """Keys of samplers that measure something on held-out text."""

    probe_rows: int | None = Field(None, ge=1)
    """Held-out rows of a measurement, rounded up to two whole micro-batches of all ranks; null: a quarter of
    ``training.batch_rows``."""


class Sampler(ABC):
    """Decides each step's plan: objective → share. Decides the same on every rank, and after a resume.

    The trainer asks for a step's :meth:`wish` and hands in what was measured by :meth:`learn`, then asks for the
    :meth:`plan`, and tells with :meth:`observe` what became of it.

    Args:
        config: of the class's :attr:`Config`.
        objectives: names, in the recipe's order.
        seed: the run's.
        steps: of the whole run.
    """

    name: str
    """What recipes call it."""
    Config: ClassVar[type[SamplerConfig]] = SamplerConfig
    modes: ClassVar[tuple[str, ...]] = ("draw", "mix")
    """What it can do, its default first."""

    def __init__(self, config: SamplerConfig, objectives: Sequence[str], seed: int, steps: int):
        self.config, self.objectives, self.seed, self.steps = config, list(objectives), seed, steps
        self.name = config.name  # the same class may do the work of two
        self.mode = config.mode or self.modes[0]
        if self.mode not in self.modes:
            raise UserError(f"sampler.mode: '{self.name}' can only '{self.modes[0]}' here; leave the key out")

    @classmethod
    def chosen_by(cls, config: SamplerConfig) -> type["Sampler"]:
        """Return the class that does what ``config`` says: this one, unless its keys choose between several."""
        return cls

    @property
    def mixes(self) -> bool:
        """Whether a step trains several objectives."""
        return self.mode == "mix"

    @property
    def probes(self) -> bool:
        """Whether it ever wants something measured on held-out text."""
        return False

    @abstractmethod
    def probabilities(self, step: int) -> dict[str, float]:
        """Return objective → probability (or share) at ``step``; they sum to 1."""

    def plan(self, step: int) -> dict[str, float]:
        """Return objective → share for ``step``; objectives with no share are left out."""
        possible = {name: each for name, each in self.probabilities(step).items() if each > 0}
        if self.mixes:
            return possible
        draw, reached = uniform(philox(self.seed, "sampler", step)[0]), 0.0
        for name, probability in possible.items():
            reached += probability
            if draw < reached:
                return {name: 1.0}
        return {next(reversed(possible)): 1.0}

    def wish(self, step: int) -> Wish | None:
        """Return what must be measured before ``step`` is planned."""
        return None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        """Take up what was wished for; return what the log shall tell of it: what → objective → number."""
        raise NotImplementedError(f"'{self.name}' wishes for nothing")

    def observe(self, step: int, plan: Mapping[str, float], losses: Mapping[str, float]) -> None:  # noqa: B027
        """Take up the training losses, objective → mean, of a step that was applied."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, as JSON holds it; rules learn nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (rules have no state)
        """Take up what was learnt."""


SAMPLERS: dict[str, type[Sampler]] = {}


def register(sampler: type[Sampler]) -> type[Sampler]:
    """Make a sampler available to recipes under its name."""
    SAMPLERS[sampler.name] = sampler
    return sampler


def parse_sampler(values: dict, where: str) -> SamplerConfig:
    """Validate the recipe's ``sampler``; a wrong key is a :class:`UserError` naming file and key."""
    configs = {name: sampler.Config for name, sampler in SAMPLERS.items()}
    return parse_named("sampler", configs, values, SamplerConfig().name, where)


def build_sampler(config: SamplerConfig, objectives: Sequence[str], seed: int, steps: int) -> Sampler:
    """Build the sampler of a recipe.

    Raises:
        UserError: if it does not fit the recipe's objectives.
    """
    return SAMPLERS[config.name].chosen_by(config)(config, objectives, seed, steps)


def mixture(shares: Mapping[str, float], objectives: Sequence[str], key: str) -> dict[str, float]:
    """Return objective → share, summing to 1, of a configuration's ``shares``; equal shares if there are none.

    Raises:
        UserError: naming ``key``, if they are not those of ``objectives``.
    """
    for name in shares:
        if name not in objectives:
            raise unknown("objective", name, objectives, key)
    if shares and (missing := [name for name in objectives if name not in shares]):
        raise UserError(f"{key}: no share for '{missing[0]}'; give it one (0 leaves it out)")
    total = sum(shares.values())
    return {name: shares[name] / total if total else 1 / len(objectives) for name in objectives}
