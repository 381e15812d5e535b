"""Losses on held-out text: the same rows, the same corruption, every time."""

import torch

from fused_objectives.philox import scalar_seed
from pretrain.training.build import Parts
from pretrain.training.engine import Engine


class HeldoutProbe:
    """Measures every objective on a fixed set of held-out rows. False if there is no held-out text."""

    def __init__(self, parts: Parts, engine: Engine):
        self.engine, self.model = engine, parts.model
        loader = parts.heldout_loader(rank=engine.rank, world_size=engine.world_size)
        self.micro_batches = loader.next().micro_batches if loader else []

    def __bool__(self) -> bool:
        return bool(self.micro_batches)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Return objective → mean loss; all ranks call it. Dropout is off where the loss allows it; no gradient
        remains."""
        results = {}
        for name, objective in self.model.objectives.items():
            self.engine.module.train(objective.needs_dropout)
            totals = {term: torch.zeros(2, device=self.engine.device) for term in objective.terms}
            for number, batch in enumerate(self.micro_batches):
                torch.manual_seed(scalar_seed(0, "held-out dropout", number, self.engine.rank))
                view = objective.heldout_view(batch.to(self.engine.device))
                _, sums = self.engine({name: view}, dict.fromkeys(objective.terms, 0.0))
                for term, per_sample in sums.items():
                    totals[term] += torch.stack([per_sample.sum(), view.counts[term].sum()])
            reduced = self.engine.all_reduce(torch.stack(list(totals.values())))
            means = (reduced[:, 0] / reduced[:, 1].clamp(min=1)).tolist()
            results[name] = sum(weight * mean for weight, mean in zip(objective.terms.values(), means, strict=True))
        self.engine.module.train()
        return results
