"""What every weigher is, and the registry: how much each sample of a step counts.

To add a weigher: give the class a ``name`` and a ``Config``, register it with ``@register`` and import its file in
``__init__.py``. The tests over the registry then cover it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from pretrain.config import Config, ScheduledNumber, parse_named
from pretrain.errors import UserError, unknown
from pretrain.influence.switch import NoiseSwitch
from pretrain.influence.weights import effective_sample_size

EACH = "each"


@dataclass(frozen=True)
class Measures:
    """What was measured of the n samples (or micro-batches) of a step, on all ranks together; the same bits on each."""

    targets: np.ndarray
    """``[n]``: how many targets of the scoring objective each has; one without is not weighed."""
    losses: np.ndarray
    """``[n]`` fp64: mean over its targets, summed over terms with their weights."""
    squares: np.ndarray | None = None
    """``[n]`` fp64: the squared norm of its gradient, or what estimates it; of a loss whose mean over the samples is
    the step's."""


class WeigherConfig(Config):
    """Keys that every weigher has."""

    name: str = "uniform"


class TemperedConfig(WeigherConfig):
    """Keys of weighers that weigh."""

    temperature: ScheduledNumber
    """τ, which multiplies the scores: above 0 high scores weigh more, below 0 low ones, 0 is uniform."""
    score_objective: str | None = None
    """The objective whose gradients (or losses) score the samples, for all objectives of the step; ``each``: every
    objective weighs by its own. Null: ``mlm``, without it the first that can, with a sampler that draws ``each``."""
    floor: float = Field(0.1, ge=0, le=1)
    """Effective sample size, as a fraction of the samples, below which the log warns."""


class Weigher(ABC):
    """Decides the weights of a step's samples, which have the mean 1. Decides the same on every rank, and after a
    resume.

    The trainer measures what :attr:`measures` says, asks for :meth:`weights`, and hands both back by :meth:`take`.

    Args:
        config: of the class's :attr:`Config`.
        objectives: objective → whether its samples have gradients of their own, in the recipe's order.
        mixes: whether every step trains all objectives.
        seed: the run's.
        steps: of the whole run.

    Raises:
        UserError: if the scoring objective is not there, or its samples have no gradients of their own.
    """

    name: str
    """What recipes call it."""
    Config: ClassVar[type[WeigherConfig]]
    measures: ClassVar[Literal["nothing", "losses", "norms"]]
    switch: NoiseSwitch | None = None
    """What wants to know of the noise of a step's gradient, if anything does."""

    def __init__(self, config: WeigherConfig, objectives: Mapping[str, bool], mixes: bool, seed: int, steps: int):
        self.config, self.seed, self.steps = config, seed, steps
        self.name = config.name
        self.scoring: list[str] = []
        """The objectives that can score."""
        self.each = False
        """Whether each of them weighs for itself; otherwise the one weighs for all objectives of the step."""
        if self.measures != "nothing":
            self.scoring, self.each = _scoring(config, objectives, mixes)
        self.below_floor = 0
        """Steps whose effective sample size was below the floor."""

    def temperature(self, step: int) -> float:
        """Return τ at ``step``."""
        return self.config.temperature.at(step / self.steps)

    def is_uniform(self, step: int) -> bool:
        """Whether all samples of ``step`` count alike, so that nothing need be measured."""
        return self.temperature(step) == 0

    def scorers(self, plan: Iterable[str]) -> list[str]:
        """Return the objectives of a plan that score; none: the step is uniform."""
        return [name for name in plan if name in self.scoring]

    def weights(self, step: int, objective: str, measures: Measures, samples: int) -> np.ndarray:
        """Return the weights ``[n]`` fp64 of what was measured.

        A sample without target, or with a score that is not finite, counts 1 and takes no part in the normalisation.

        Args:
            objective: which one was measured.
            samples: in the global batch, of which ``measures`` may be a part if :attr:`weighs_apart`.
        """
        scores, scored = self._scored(measures)
        weights = np.ones(len(scores))
        weights[scored] = self._weigh(step, objective, scores[scored], samples)
        return weights

    @abstractmethod
    def scores(self, measures: Measures) -> np.ndarray:
        """Return the scores ``[n]`` of what was measured."""

    @abstractmethod
    def _weigh(self, step: int, objective: str, scores: np.ndarray, samples: int) -> np.ndarray:
        """Return the weights of the scores ``[n]``, which are all finite."""

    def _scored(self, measures: Measures) -> tuple[np.ndarray, np.ndarray]:
        scores = self.scores(measures)
        return scores, (measures.targets > 0) & np.isfinite(scores)

    def weighs_apart(self, objective: str) -> bool:
        """Whether a part of the step can be weighed before the rest is measured."""
        return False

    def take(self, step: int, objective: str, measures: Measures, weights: np.ndarray) -> str | None:
        """Take up what a whole step measured and how it was weighed; return a warning, if there is cause for one."""
        size = effective_sample_size(weights)
        if size >= self.config.floor:
            return None
        self.below_floor += 1
        if str(self.below_floor).strip("0") != "1":  # the first, the tenth, the hundredth, …
            return None
        return (
            f"warning: step {step + 1}: the effective sample size is {size:.3f} of the samples, "
            f"{self.config.floor - size:.3f} below weigher.floor (steps so far: {self.below_floor}); "
            "a weigher.temperature nearer 0 spreads the weights"
        )

    def told(self, step: int) -> dict[str, float]:
        """Return what the log tells of ``step``."""
        return {"temperature": self.temperature(step)}

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken up, as JSON holds it."""
        return {"below_floor": self.below_floor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        self.below_floor = state["below_floor"]


WEIGHERS: dict[str, type[Weigher]] = {}


def register(weigher: type[Weigher]) -> type[Weigher]:
    """Make a weigher available to recipes under its name."""
    WEIGHERS[weigher.name] = weigher
    return weigher


def parse_weigher(values: dict, where: str) -> WeigherConfig:
    """Validate the recipe's ``weigher``; a wrong key is a :class:`UserError` naming file and key."""
    configs = {name: weigher.Config for name, weigher in WEIGHERS.items()}
    return parse_named("weigher", configs, values, WeigherConfig().name, where)


def build_weigher(config: WeigherConfig, objectives: Mapping[str, bool], mixes: bool, seed: int, steps: int) -> Weigher:
    """Build the weigher of a recipe; the arguments are those of :class:`Weigher`."""
    return WEIGHERS[config.name](config, objectives, mixes, seed, steps)


def _scoring(config: TemperedConfig, objectives: Mapping[str, bool], mixes: bool) -> tuple[list[str], bool]:
    """Return the objectives that can score, and whether each does for itself."""
    able = [name for name, has_gradients in objectives.items() if has_gradients]
    wanted = config.score_objective
    if wanted is None:
        wanted = EACH if not mixes else "mlm" if "mlm" in able else able[0] if able else EACH
    if wanted != EACH and wanted not in objectives:
        raise unknown("objective", wanted, [*able, EACH], "weigher.score_objective")
    if not able or wanted not in (*able, EACH):
        which = f"'{wanted}'" if wanted != EACH else ", ".join(objectives)
        hint = f"name one of {', '.join(able)}" if able else "set weigher.name to uniform"
        raise UserError(f"weigher.score_objective: the samples of {which} have no gradients of their own; {hint}")
    return (able, True) if wanted == EACH else ([wanted], False)
