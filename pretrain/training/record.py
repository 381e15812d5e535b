"""The record of a step: one line of ``metrics.jsonl``. docs/formats.md describes the fields."""

from dataclasses import dataclass

import torch

from pretrain.data.loader import StepBatch
from pretrain.objectives import Objective


@dataclass
class StepFacts:
    """What a step was and did, on all ranks together."""

    batch: StepBatch
    plan: dict[str, float]
    """Objective → share."""
    probabilities: dict[str, float]
    """Objective → the sampler's probability."""
    targets: dict[str, float]
    """Term → targets in the global batch."""
    tallies: dict[str, float]
    """What else the objectives counted in the global batch."""
    sums: dict[str, float]
    """Term → sum of losses over the global batch; and what the forward pass counted there."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping, None if the step was skipped."""
    seconds: float
    effective_sample_size: float = 1.0
    """(Σw)² / Σw² over the sample weights, as a fraction of the samples."""

    @property
    def means(self) -> dict[str, float]:
        """Term → mean loss a target."""
        return {term: self.sums[term] / max(count, 1.0) for term, count in self.targets.items()}

    @property
    def counted(self) -> dict[str, float]:
        """All tallies, before and in the forward pass."""
        return self.tallies | {name: number for name, number in self.sums.items() if name not in self.targets}

    def fractions(self, objectives: dict[str, Objective]) -> dict[str, float]:
        """Return tally → its part of the targets, for those of the plan that are logged so."""
        wanted = {tally: term for name in self.plan for tally, term in objectives[name].fractions.items()}
        return {tally: self.counted[tally] / max(self.targets[term], 1.0) for tally, term in wanted.items()}

    def losses(self, objectives: dict[str, Objective]) -> dict[str, float]:
        """Return objective → loss: the weighted sum of its terms' means."""
        means = self.means
        return {
            name: sum(weight * means[term] for term, weight in objectives[name].terms.items()) for name in self.plan
        }

    def record(self, objectives: dict[str, Objective]) -> dict:
        """Return the fields that the step alone decides; numbers may be NaN."""
        losses = self.losses(objectives)
        return {
            "loss": sum(share * losses[name] for name, share in self.plan.items()),
            "losses": losses,
            "terms": self.means,
            "targets": {term: int(count) for term, count in self.targets.items()},
            "tallies": {name: int(number) for name, number in self.counted.items()},
            "fractions": self.fractions(objectives),
            "plan": self.plan,
            "probabilities": self.probabilities,
            "effective_sample_size": self.effective_sample_size,
            "lr": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens": self.batch.tokens,
            "samples": self.batch.samples,
            "sample_ids_sha256": self.batch.sample_ids_sha256,
            "seconds": self.seconds,
            "tokens_per_second": self.batch.tokens / self.seconds,
        }


def add_sums(sums: dict[str, torch.Tensor], of_samples: dict[str, torch.Tensor]) -> None:
    """Add the losses of a micro-step's samples, term → ``[S]``, to the sums, term → ``[]``; and what was counted."""
    for term, per_sample in of_samples.items():
        sums[term] = sums.get(term, 0.0) + per_sample.sum()
