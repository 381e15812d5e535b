"""PRESENCE (arXiv 2311.00913): samples weighed by their self-influence, the squared norm of their own gradient."""

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from pretrain.config import Scheduled, ScheduledNumber
from pretrain.errors import UserError
from pretrain.influence.base import Measures, TemperedConfig, Weigher, register
from pretrain.influence.switch import NoiseSwitch
from pretrain.influence.weights import permuted, softmax_weights, standardised, window_weights

MICROBATCH = "microbatch"
_OF_SAMPLES = ("score", "sketch_size", "score_objective")


class PresenceConfig(TemperedConfig):
    """Keys of ``presence``, and of its control ``shuffled``."""

    temperature: ScheduledNumber = Scheduled(schedule="steps", start=1.0, steps={0.1: -1.0})
    """The paper's two stages: first novelty, then, from a tenth of the run on, stability."""
    granularity: Literal["sample", "microbatch"] = "sample"
    """What has a weight: a sample, or as in the paper a micro-batch, one micro-step of all ranks."""
    layers: str | list[str] = "first_block"
    """K, whose gradients count: ``first_block`` (of the encoder, and of a decoder; the paper's), ``layer_norms``,
    ``all``, or names of modules."""
    score: Literal["gram", "sketch", "layer_norm"] = "gram"
    """How a sample's norm is found: exactly, from a random sketch, or from K's layer norms alone."""
    sketch_size: int = Field(16, ge=1)
    """Rows and columns of a sketch."""
    gradient: Literal["deferred", "two_pass"] = "deferred"
    """How the weighted gradient is found: from what a backward has kept, of a micro-batch its gradient, or by a second
    forward and backward."""
    normalise: Literal["batch", "window"] = "batch"
    """What a score is compared with: the scores of its global batch, or those of the samples before it."""
    window: int = Field(1024, ge=2)
    """How many scores a window holds."""
    length_normalised: bool = False
    """Score the mean of a sample's losses and not their sum, whose gradient grows with the sample."""
    switch: Literal["auto"] | None = None
    """``auto``: go from the first temperature to the last when a step's gradient is more noise than signal, not at a
    given step."""
    signal: Literal["norm", "split"] = "norm"
    """Of a micro-batch: the squared norm of its gradient, or the product of its halves' gradients, which noise does not
    raise."""

    @property
    def halves(self) -> int:
        """Micro-steps of a micro-batch."""
        return 2 if self.signal == "split" else 1

    @model_validator(mode="after")
    def _goes_together(self):
        default = {name: field.default for name, field in type(self).model_fields.items()}
        if self.granularity == MICROBATCH:
            for name in _OF_SAMPLES:
                if getattr(self, name) != default[name]:
                    raise ValueError(f"'{name}' goes with granularity sample, not with microbatch")
        elif self.signal != default["signal"]:
            raise ValueError("'signal: split' goes with granularity microbatch")
        if self.sketch_size != default["sketch_size"] and self.score != "sketch":
            raise ValueError("'sketch_size' goes with score sketch")
        if self.window != default["window"] and self.normalise != "window":
            raise ValueError("'window' goes with normalise window")
        if self.switch and self.temperature.at(0) == self.temperature.at(1):
            raise ValueError("'switch: auto' needs a temperature that ends at another value than it starts at")
        return self


@register
class PresenceWeigher(Weigher):
    """w = n · softmax(τ · z), z the standardised self-influence of n samples or micro-batches.

    With a window z and the softmax are relative to scores that came before, the step's own left out. Until there are
    any, the batch is what is compared with.
    """

    name = "presence"
    Config = PresenceConfig
    measures = "norms"
    shuffles = False
    """Whether the weights are handed out at random."""

    def __init__(self, config, objectives, mixes, seed, steps):
        if config.granularity == MICROBATCH:  # a micro-batch has a gradient, whatever its objectives
            objectives = dict.fromkeys(objectives, True)
        super().__init__(config, objectives, mixes, seed, steps)
        self.switch = NoiseSwitch() if config.switch else None
        if self.switch and mixes and len(self.scoring) > 1 and config.granularity != MICROBATCH:
            raise UserError(
                "weigher.switch: 'auto' needs one objective that scores; name it in weigher.score_objective, such as "
                f"'{self.scoring[0]}'"
            )
        self.windows: dict[str, list[float]] = {}
        """Objective → the latest scores, the oldest first."""

    def temperature(self, step: int) -> float:
        if self.switch is None:
            return super().temperature(step)
        return self.config.temperature.at(1.0 if self.switch.thrown else 0.0)

    def is_uniform(self, step: int) -> bool:
        return super().is_uniform(step) and not (self.switch and self.switch.is_due(step))

    def weighs_apart(self, objective: str) -> bool:
        return not self.shuffles and len(self.windows.get(objective, ())) > 1

    def scores(self, measures: Measures) -> np.ndarray:
        if self.config.length_normalised:
            return measures.squares / np.maximum(measures.targets, 1.0) ** 2
        return measures.squares

    def _weigh(self, step: int, objective: str, scores: np.ndarray, samples: int) -> np.ndarray:
        temperature, window = self.temperature(step), np.array(self.windows.get(objective, ()))
        if len(window) > 1:
            exponents = (temperature * standardised(each, window) for each in (scores, window))
            weights = window_weights(*exponents, bound=samples)
        else:
            weights = softmax_weights(temperature * standardised(scores))
        return permuted(weights, self.seed, step) if self.shuffles else weights

    def take(self, step: int, objective: str, measures: Measures, weights: np.ndarray) -> str | None:
        if self.config.normalise == "window":
            scores, scored = self._scored(measures)
            window = self.windows.get(objective, []) + scores[scored].tolist()
            self.windows[objective] = window[-self.config.window :]
        return super().take(step, objective, measures, weights)

    def told(self, step: int) -> dict[str, float]:
        ratio = self.switch.ratio if self.switch else None
        return super().told(step) | ({} if ratio is None else {"noise_to_signal": ratio})

    def state_dict(self) -> dict[str, Any]:
        windows = {name: list(window) for name, window in self.windows.items()}
        switch = {"switch": self.switch.state_dict()} if self.switch else {}
        return super().state_dict() | {"windows": windows} | switch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.windows = {name: list(window) for name, window in state["windows"].items()}
        if self.switch:
            self.switch.load_state_dict(state["switch"])


@register
class ShuffledWeigher(PresenceWeigher):
    """The control: PRESENCE's weights of the very same step, handed out at random. A gain that it has too is not one
    of self-influence."""

    name = "shuffled"
    shuffles = True
