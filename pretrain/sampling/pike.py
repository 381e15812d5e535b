"""PiKE: mix by the gradients' sizes and noise (arXiv 2502.06244)."""

import math

from pydantic import Field

from pretrain.sampling.base import Measured, ProbingConfig, Wish, register
from pretrain.sampling.learning import LearningSampler


class PikeConfig(ProbingConfig):
    """Keys of ``pike``."""

    interval_steps: int = Field(100, ge=1)
    """Steps between measurements (T₀)."""
    gradient_rate: float = Field(0.1, ge=0)
    """ζ₁."""
    noise_rate: float = Field(0.1, ge=0)
    """ζ₂."""


@register
class PikeSampler(LearningSampler):
    """Learns w_k ∝ w_k exp(ζ₁ ‖∇L_k‖² − ζ₂ σ_k² / 2b).

    The rule is the paper's; b is the batch and σ_k² the variance of a sample's gradient. Ours: both terms are divided
    by the mean of |‖∇L_k‖²| + σ_k² / 2b over the objectives, so that the rates mean the same in every run. A loss whose
    gradients are large by its scale alone keeps that advantage, as in the paper.
    """

    name = "pike"
    Config = PikeConfig
    modes = ("mix", "draw")

    @property
    def probes(self) -> bool:
        return True

    def wish(self, step: int) -> Wish | None:
        return Wish.NOISE if step % self.config.interval_steps == 0 else None

    def learn(self, step: int, measured: Measured) -> dict[str, dict[str, float]]:
        squares, noise = measured.squares, measured.noise
        if self.finite(squares, noise):
            unit = math.fsum(abs(squares[name]) + noise[name] / 2 for name in squares) / len(squares)
            for name in squares if unit > 0 else ():
                gain, loss = self.config.gradient_rate * squares[name], self.config.noise_rate * noise[name] / 2
                self.logits[name] += (gain - loss) / unit
        return self.told(losses=measured.losses, squares=squares, noise=noise)
