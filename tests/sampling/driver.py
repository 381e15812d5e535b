"""Runs a sampler as the trainer does, on measurements and losses that are functions of the step."""

import copy
import math
from collections.abc import Callable

from fused_objectives.philox import philox, uniform
from pretrain.sampling import Measured, Sampler, build_sampler, parse_sampler

NAMES = ["mlm", "rtd", "end_task"]


def sampler(name: str, objectives=tuple(NAMES), seed: int = 3, steps: int = 1000, **keys) -> Sampler:
    return build_sampler(parse_sampler({"name": name, **keys}, "r.yaml"), list(objectives), seed, steps)


def number(stream: str, step: int, index: int) -> float:
    """Return a number in [0, 1), the same every time."""
    return uniform(philox(7, stream, step, index)[0])


def measured(step: int, objectives=tuple(NAMES)) -> Measured:
    """Return measurements of a training in which losses fall and everything is noisy."""
    falling = 2 + 3 * math.exp(-step / 300)

    def noisy(stream: str, height: float) -> dict[str, float]:
        return {name: height * (0.8 + 0.4 * number(stream, step, index)) for index, name in enumerate(objectives)}

    return Measured(
        losses=noisy("losses", falling),
        products=noisy("products", 0.5),
        squares=noisy("squares", 1.5),
        noise=noisy("noise", 0.7),
        direction_square=1.3,
    )


def losses(step: int, plan: dict[str, float]) -> dict[str, float]:
    """Return training losses of what a plan trains."""
    return {name: 3 + number("training", step, index) for index, name in enumerate(plan)}


def advance(some: Sampler, step: int, *, measure: Callable = measured, train: Callable = losses) -> dict:
    """Do a step as the trainer does; return all that it shows."""
    wish = some.wish(step)
    lesson = some.learn(step, measure(step, some.objectives)) if wish else {}
    plan = some.plan(step)
    shown = {"wish": wish, "lesson": lesson, "plan": plan, "probabilities": dict(some.probabilities(step))}
    some.observe(step, plan, train(step, plan))
    return copy.deepcopy(shown)
