"""The end task and its auxiliary objectives together in every step (TARTAN, arXiv 2109.07437)."""

import math
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.errors import UserError
from pretrain.sampling.base import Measured, Sampler, SamplerConfig, Wish, register
from pretrain.sampling.rules import FixedSampler

END_TASK = "end_task"


@register
class MultiTaskTartanSampler(FixedSampler):
    """MT-TARTAN: all objectives in every step, with equal weights that stay as they are."""

    name = "mt_tartan"
    modes = ("mix",)

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        _check_end_task(self)


class MetaTartanConfig(SamplerConfig):
    """Keys of ``meta_tartan``."""

    meta_gradient: Literal["cosine", "exact"] = "cosine"
    """``cosine``: the cosine goes straight on to the logit, as the authors have it; ``exact``: the gradient of the dev
    loss after the step, by the logits."""
    learning_rate: float = Field(0.01, gt=0)
    """Of the logits."""
    interval_steps: int = Field(1, ge=1)
    """Steps between two comparisons with the dev gradient; in the others the weights stay."""
    dev_samples: int = Field(64, ge=1)
    """Samples of the dev split whose loss gives the dev gradient."""
    head_samples: int = Field(32, ge=1)
    """Other samples of it, on which the dev head is fitted."""
    head_steps: int = Field(10, ge=0)
    """Most steps of fitting the dev head; it ends when the loss moves by less than 1e-3."""
    head_learning_rate: float = Field(1e-3, gt=0)


@register
class MetaTartanSampler(Sampler):
    """META-TARTAN: weights w = softmax(logits), learnt from how each objective's gradient g agrees with the gradient d
    of the end task on its dev split, by the backbone's parameters.

    ``cosine``: logit ← logit + β ⟨d, g⟩ / ‖d‖‖g‖. ``exact``: the loss on dev after a step of length α along −Σ w·g
    changes by −α ⟨d, Σ w·g⟩, whose gradient by a logit is −α w (⟨d, g⟩ − Σ w ⟨d, g⟩); α is left to β.
    """

    name = "meta_tartan"
    Config = MetaTartanConfig
    modes = ("mix",)

    def __init__(self, config, objectives, seed, steps):
        super().__init__(config, objectives, seed, steps)
        _check_end_task(self)
        self.logits = np.zeros(len(objectives))
        self.ignored = 0

    def probabilities(self, step: int) -> dict[str, float]:
        powers = np.exp(self.logits - self.logits.max())
        return dict(zip(self.objectives, (powers / powers.sum()).tolist(), strict=True))

    def wish(self, step: int) -> Wish | None:
        return Wish.STEP if step % self.config.interval_steps == 0 else None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        products = np.array([measured.products[name] for name in self.objectives])
        squares = np.array([measured.squares[name] for name in self.objectives])
        cosines = products / np.sqrt(np.maximum(squares * measured.direction_square, 1e-60))
        if not np.isfinite(cosines).all():
            self.ignored += 1
            return {"ignored": {"measurements": float(self.ignored)}}
        if self.config.meta_gradient == "cosine":
            ascent = cosines
        else:
            weights = np.array(list(self.probabilities(step).values()))
            ascent = weights * (products - weights @ products)
        self.logits = self.logits + self.config.learning_rate * ascent
        return {
            "alignments": dict(zip(self.objectives, cosines.tolist(), strict=True)),
            "gradient_norms": {name: math.sqrt(square) for name, square in measured.squares.items()},
        }

    def check_dev_split(self, samples: int) -> None:
        """Raise :class:`UserError` if the dev split has fewer samples than one comparison takes."""
        config = self.config
        if samples < config.head_samples + config.dev_samples:
            raise UserError(
                f"sampler.dev_samples: {config.dev_samples}, and {config.head_samples} for the dev head "
                f"(sampler.head_samples), are more than the {samples} samples of the dev split; lower them"
            )

    def state_dict(self) -> dict:
        return {"logits": self.logits.tolist(), "ignored": self.ignored}

    def load_state_dict(self, state: dict) -> None:
        self.logits, self.ignored = np.array(state["logits"], dtype=np.float64), state["ignored"]


def _check_end_task(sampler: Sampler) -> None:
    if END_TASK not in sampler.objectives:
        raise UserError(f"sampler.name: '{sampler.name}' needs the objective '{END_TASK}'; add it to objectives")
