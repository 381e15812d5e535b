"""A training in miniature, in which it is known what each objective is worth: samplers are compared on it.

Weights θ have a shared part of 100 numbers (the trunk) and 20 of each objective's own (its head and whatever it needs
alone). The loss of objective j is

    L_j(θ) = irreducible_j + shared_j · Q(θ_trunk) + own_j · Q_j(θ_j),    Q(x) ∝ Σ_i (x_i − target_i)² / i,  Q(0) = 1

so that curvatures fall as 1/i and losses as a power of the steps, as in pre-training. A gradient is ∇L_j plus normal
noise, every coordinate alike; at noise 1 its norm is at the start about that of the trunk's part of ∇L. Updates are
Adam's (0.9, 0.98), one state for the trunk whoever trains it, and an objective's own part stays as it is in steps
without it. Peak learning rate 2e-3, 6 % warm-up, linear decay; 6,000 steps.

| objective | irreducible | shared | own | noise | |
|---|---|---|---|---|---|
| useful | 1 | 1.5 | 0.25 | 0.5 | its steps lower every loss |
| noisy | 1 | 1 | 0.25 | 4 | so do these, but with eight times the noise |
| ordinary | 1 | 0.5 | 0.5 | 1 | helps itself, the others less |
| early | 1 | 0.5 | 0.25 | 1 | its own part is nearer (0.3) and equally curved: learnt in a quarter of the run |
| waste | 2 | 0.1, other targets | 0 | 1 | nothing to learn but what harms the others a little |

That is ``MIXED``. In ``STEEP`` the useful objective is the best only in the long run: its shared weight is 1 and its
noise 1, ordinary and early have 0.25 shared and 1 and 0.5 of their own, steeper than the trunk, so that for most of the
run they lower the sum of losses faster. ``ALIKE`` is five times the same objective without a part of its own: nothing
to tell apart but noise.

Held-out text differs from the rest by a smooth random function of θ for each objective, a sum of sines with standard
deviation 0.02 that changes over a move of length 1 (20 steps move θ by about 0.1, a run by 5): losses on fixed rows are
exact functions of θ and yet not those of the training; losses on fresh rows have a new draw of it every time. Each half
of the rows, for gradients, has its own, √2 as large; with ``new_rows`` that, too, is drawn anew for every measurement.

A run's quality is the sum of the L_j at its end, without the held-out text's deviation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.sampling import Measured, Sampler, Wish

TRUNK, OWN = 100, 20
BETAS, EPS = (0.9, 0.98), 1e-8
PEAK, WARMUP, STEPS = 2e-3, 0.06, 6000
NOISE = 0.05
"""Standard deviation of a coordinate of a gradient's noise, times the objective's."""
DEVIATION, LENGTH, SINES = 0.02, 1.0, 64


@dataclass(frozen=True)
class Objective:
    """What a loss is made of; see the module."""

    irreducible: float = 1.0
    shared: float = 1.0
    own: float = 0.25
    noise: float = 1.0
    near: bool = False
    """Its own part is nearer and equally curved."""
    contrary: bool = False
    """Its targets for the trunk are not the others'."""


_WASTE = Objective(irreducible=2.0, shared=0.1, own=0.0, contrary=True)
MIXED = {
    "useful": Objective(shared=1.5, noise=0.5),
    "noisy": Objective(noise=4.0),
    "ordinary": Objective(shared=0.5, own=0.5),
    "early": Objective(shared=0.5, near=True),
    "waste": _WASTE,
}
STEEP = {
    "useful": Objective(),
    "noisy": Objective(noise=4.0),
    "ordinary": Objective(shared=0.25, own=1.0),
    "early": Objective(shared=0.25, own=0.5, near=True),
    "waste": _WASTE,
}
ALIKE = {name: Objective(own=0.0) for name in ("one", "two", "three", "four", "five")}


class Testbed:
    """Trainings side by side, one a seed, of the same objectives.

    Args:
        objectives: name → what its loss is made of.
        seeds: each decides a training's targets, noise and held-out text.
        steps: of a run.
        new_rows: whether gradients are measured on other held-out rows every time.
    """

    __test__ = False  # no test for pytest

    def __init__(self, objectives: dict[str, Objective], seeds: Sequence[int], steps: int, new_rows: bool = False):
        self.names, self.steps, self.step, self.new_rows = list(objectives), steps, 0, new_rows
        kinds, count = list(objectives.values()), len(objectives)
        size = TRUNK + count * OWN
        self._random = [np.random.default_rng([seed, 0]) for seed in seeds]
        self._irreducible = np.array([kind.irreducible for kind in kinds])
        self._sigmas = NOISE * np.array([kind.noise for kind in kinds])
        self._reach = np.zeros((count, size))
        landscapes = [self._landscape(kinds, np.random.default_rng([seed, 1])) for seed in seeds]
        self._curvature, self._target = np.array(landscapes).swapaxes(0, 1)  # [seeds, objectives, size] each
        for number in range(count):
            self._reach[number, :TRUNK] = 1
            self._reach[number, TRUNK + number * OWN : TRUNK + (number + 1) * OWN] = 1
        self.theta = np.zeros((len(seeds), size))
        self._mean, self._square, self._updates = (np.zeros_like(self.theta) for _ in range(3))
        self._seeds = list(seeds)
        self._heldout = [self._halves(seed) for seed in seeds]

    def _halves(self, seed: int) -> list["_Deviation"]:
        return [_Deviation((seed, 2 + half, self.step), *self._reach.shape) for half in range(2)]

    @staticmethod
    def _landscape(kinds: list[Objective], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return curvatures and targets ``[objectives, size]``."""
        size = TRUNK + len(kinds) * OWN
        curvature, target = np.zeros((len(kinds), size)), np.zeros((len(kinds), size))
        common, contrary = random.standard_normal((2, TRUNK))
        for number, kind in enumerate(kinds):
            own = slice(TRUNK + number * OWN, TRUNK + (number + 1) * OWN)
            target[number, :TRUNK] = contrary if kind.contrary else common
            target[number, own] = (0.3 if kind.near else 1.0) * random.standard_normal(OWN)
            for part, weight, flat in ((slice(0, TRUNK), kind.shared, False), (own, kind.own, kind.near)):
                length = part.stop - part.start
                height = np.ones(length) if flat else 1 / np.arange(1, length + 1)
                curvature[number, part] = 2 * weight * height / (height * target[number, part] ** 2).sum()
        return curvature, target

    def losses(self) -> np.ndarray:
        """Return the losses ``[seeds, objectives]``."""
        away = self.theta[:, None] - self._target
        return self._irreducible + (self._curvature * away * away).sum(-1) / 2

    def gradients(self) -> np.ndarray:
        """Return their gradients ``[seeds, objectives, size]``."""
        return self._curvature * (self.theta[:, None] - self._target)

    def train(self, shares: np.ndarray) -> np.ndarray:
        """Do a step on ``shares [seeds, objectives]``; return the losses as a training batch shows them."""
        gradient = (shares[..., None] * self.gradients()).sum(1)
        noise = np.stack([random.standard_normal(gradient.shape[1]) for random in self._random])
        gradient += noise * np.sqrt((shares * self._sigmas) ** 2 @ self._reach)
        trained = (shares > 0) @ self._reach > 0
        self._updates += trained
        for moment, beta, new in ((self._mean, BETAS[0], gradient), (self._square, BETAS[1], gradient**2)):
            moment[trained] += (1 - beta) * (new - moment)[trained]
        updates = np.maximum(self._updates, 1)
        mean, square = self._mean / (1 - BETAS[0] ** updates), self._square / (1 - BETAS[1] ** updates)
        self.theta -= np.where(trained, self._learning_rate() * mean / (np.sqrt(square) + EPS), 0)
        shown = self.losses() * (1 + DEVIATION * np.stack([r.standard_normal(len(self.names)) for r in self._random]))
        self.step += 1
        return shown

    def _learning_rate(self) -> float:
        done = (self.step + 1) / self.steps
        return PEAK * (done / WARMUP if done < WARMUP else (1 - done) / (1 - WARMUP))

    def measure(self, run: int, wish: Wish) -> Measured:
        """Return what the sampler of one of the trainings wishes for."""
        theta, random = self.theta[run], self._random[run]
        away = theta - self._target[run]
        losses = self._irreducible + (self._curvature[run] * away * away).sum(-1) / 2
        gradients = self._curvature[run] * away
        if wish is Wish.FRESH_LOSSES:
            return Measured(losses=self._named(losses + DEVIATION * random.standard_normal(len(losses))))
        anew = self.new_rows and wish is not Wish.LOSSES
        halves = self._halves(self._seeds[run]) if anew else self._heldout[run]
        (one, slope_one), (other, slope_other) = (half.at(theta) for half in halves)
        losses = losses + (one + other) / 2
        first, second = gradients + slope_one, gradients + slope_other
        if wish is Wish.LOSSES:
            return Measured(losses=self._named(losses))
        if wish is Wish.NOISE:
            noise = self._sigmas**2 * (TRUNK + OWN) * (1 + 0.1 * random.standard_normal(len(losses)))
            return Measured(
                self._named(losses), squares=self._named((first * second).sum(-1)), noise=self._named(noise)
            )
        direction = (first / losses[:, None]).sum(0)
        return Measured(
            losses=self._named(losses),
            products=self._named(second @ direction),
            squares=self._named((second * second).sum(-1)),
            direction_square=float(direction @ direction),
        )

    def _named(self, numbers: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, numbers.tolist(), strict=True))


class _Deviation:
    """How the losses on half of the held-out rows differ from the losses: smooth functions of the weights."""

    def __init__(self, seed: tuple[int, ...], count: int, size: int):
        random = np.random.default_rng(seed)
        self._waves = random.standard_normal((count, SINES, size)) / LENGTH
        self._phases = random.uniform(0, 2 * math.pi, (count, SINES))
        self._height = math.sqrt(2) * DEVIATION * math.sqrt(2 / SINES)

    def at(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``[objectives]`` and gradients ``[objectives, size]``."""
        angles = self._waves @ theta + self._phases
        slopes = np.einsum("js,jsd->jd", np.cos(angles), self._waves)
        return self._height * np.sin(angles).sum(-1), self._height * slopes


@dataclass(frozen=True)
class Trace:
    """What samplers did: ``shares [records, seeds, objectives]`` as planned, averaged over ``every`` steps each,
    ``probabilities`` alike, and ``losses [seeds, objectives]`` at the end."""

    every: int
    shares: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """The quality of each run: sum of its losses, ``[seeds]``."""
        return self.losses.sum(-1)


def run(
    make: Callable[[list[str], int, int], Sampler],
    objectives: dict[str, Objective],
    seeds: Sequence[int],
    steps: int,
    *,
    new_rows: bool = False,
    every: int = 100,
) -> Trace:
    """Train with a sampler of one's own each: ``make(names, seed, steps)``."""
    world = Testbed(objectives, seeds, steps, new_rows)
    samplers = [make(world.names, seed, steps) for seed in seeds]
    shape = (-(-steps // every), len(seeds), len(world.names))
    shares, probabilities = np.zeros(shape), np.zeros(shape)
    planned = np.zeros(shape[1:])
    for step in range(steps):
        for number, sampler in enumerate(samplers):
            if wish := sampler.wish(step):
                sampler.learn(step, world.measure(number, wish))
            plan = sampler.plan(step)
            planned[number] = [plan.get(name, 0.0) for name in world.names]
            if step % every == 0:
                probabilities[step // every, number] = list(sampler.probabilities(step).values())
        shown = world.train(planned)
        for number, sampler in enumerate(samplers):
            losses = {name: float(shown[number, at]) for at, name in enumerate(world.names) if planned[number, at]}
            sampler.observe(step, {name: float(planned[number, world.names.index(name)]) for name in losses}, losses)
        shares[step // every] += planned / every
    return Trace(every, shares, probabilities, world.losses())


def run_mixtures(
    mixtures: np.ndarray, objectives: dict[str, Objective], seeds: Sequence[int], steps: int, mode: str = "draw"
) -> np.ndarray:
    """Train with fixed ``mixtures [mixtures, objectives]``; return the runs' qualities ``[mixtures, seeds]``."""
    each = np.repeat(mixtures, len(seeds), 0)
    world = Testbed(objectives, list(seeds) * len(mixtures), steps)
    draws, borders = np.random.default_rng([len(each), 9]), each.cumsum(-1)
    for _ in range(steps):
        chosen = (draws.random((len(each), 1)) > borders).sum(-1).clip(max=each.shape[1] - 1)
        world.train(each if mode == "mix" else np.eye(each.shape[1])[chosen])
    return world.losses().sum(-1).reshape(len(mixtures), len(seeds))
