"""Losses on held-out text, dropout off where the loss allows it."""

from collections.abc import Iterator, Sequence

import torch

from fused_objectives.philox import scalar_seed
from pretrain.data.batch import Batch
from pretrain.objectives import Objective, View
from pretrain.training.build import Parts
from pretrain.training.engine import Engine


class HeldoutProbe:
    """Measures every objective on a fixed set of held-out rows: the same corruption every time. False if there is no
    held-out text."""

    def __init__(self, parts: Parts, engine: Engine):
        self.engine, self.model = engine, parts.model
        loader = parts.heldout_loader(rank=engine.rank, world_size=engine.world_size)
        self.micro_batches = loader.next().micro_batches if loader else []

    def __bool__(self) -> bool:
        return bool(self.micro_batches)

    def losses(self) -> dict[str, float]:
        """Return objective → mean loss; all ranks call it. No gradient remains."""
        return heldout_losses(self.engine, self.model.objectives, self.micro_batches)


@torch.no_grad()
def heldout_losses(
    engine: Engine, objectives: dict[str, Objective], micro_batches: Sequence[Batch]
) -> dict[str, float]:
    """Return objective → mean loss over micro-batches of all ranks; all ranks call it."""
    results = {}
    for name, objective in objectives.items():
        totals = {term: torch.zeros(2, device=engine.device) for term in objective.terms}
        for view in judged(engine, objective, micro_batches):
            _, sums = engine({name: view}, dict.fromkeys(objective.terms, 0.0))
            for term, total in totals.items():
                total += torch.stack([sums[term].sum(), view.counts[term].sum()])
        reduced = engine.all_reduce(torch.stack(list(totals.values())))
        means = (reduced[:, 0] / reduced[:, 1].clamp(min=1)).tolist()
        results[name] = sum(weight * mean for weight, mean in zip(objective.terms.values(), means, strict=True))
    return results


def judged(engine: Engine, objective: Objective, micro_batches: Sequence[Batch]) -> Iterator[View]:
    """Yield the views by which an objective is judged, one a micro-batch, each with the model in the mode for it."""
    engine.module.train(objective.needs_dropout)
    try:
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(scalar_seed(0, "held-out dropout", number, engine.rank))
            yield objective.heldout_view(batch.to(engine.device))
    finally:
        engine.module.train()
