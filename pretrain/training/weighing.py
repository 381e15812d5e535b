"""Weighing the samples of a step: how the gradient Σ w · g is come by.

*In two passes*: the first measures the samples and its gradients are forgotten, the second is an ordinary one with
weights. *Deferred*: one forward and one backward, which keep what the gradients are made of until the weights are
known. Micro-batches are weighed in ``micro_batches.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.data.loader import StepBatch
from pretrain.errors import UserError
from pretrain.influence import Measures
from pretrain.influence.presence import MICROBATCH
from pretrain.influence.sample_log import SampleLog
from pretrain.influence.weights import effective_sample_size
from pretrain.objectives import View
from pretrain.sampling import Wish
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.gradient import Gradient
from pretrain.training.micro_batches import check_micro_batches, lone_samples, weigh_micro_batches
from pretrain.training.record import add_sums
from pretrain.training.scoring import Columns, Scoring, ghosts_of

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

Views = list[dict[str, View]]
"""For each micro-step, objective → view."""
Found = tuple[dict[str, torch.Tensor], dict[str, Measures], dict[str, np.ndarray]]
"""This rank's sums of losses, a scalar a term; and of the global batch, by scoring objective, measures and weights."""


@dataclass(frozen=True)
class Weighed:
    """What weighing did in a step."""

    effective_sample_size: float = 1.0
    """As a fraction of the samples (or micro-batches); of several scoring objectives the mean."""
    told: dict[str, float] = field(default_factory=dict)
    """What the log tells of the weigher."""


def check_weighing(parts: Parts, world_size: int) -> None:
    """Raise :class:`UserError` if the recipe's weigher cannot work with its model, its sampler or its micro-batches."""
    weigher = parts.weigher
    if weigher.measures == "nothing":
        return
    if parts.sampler.wish(0) is Wish.STEP:
        raise UserError(
            f"weigher.name: '{weigher.name}' does not go with the sampler '{parts.sampler.name}', which takes the step "
            "apart itself; set it to uniform, or choose another sampler"
        )
    if ghosts_of(parts) and weigher.config.granularity == MICROBATCH:
        check_micro_batches(parts, world_size)


class Weighing:
    """Accumulates the gradients of steps whose samples are weighed; all ranks make the same calls."""

    def __init__(self, parts: Parts, engine: Engine):
        self.weigher, self.engine, training = parts.weigher, engine, parts.recipe.training
        self.scoring = Scoring(parts, engine)
        self.by_micro_batch = bool(self.scoring.ghosts) and parts.weigher.config.granularity == MICROBATCH
        self.memory: list[Gradient] = []
        """Of gradients of micro-steps that are needed no longer, for those of the next."""
        self.lone_samples = lone_samples(parts, engine.world_size) if self.by_micro_batch else 0.0
        self.micro_steps = training.batch_rows // (training.micro_batch_rows * engine.world_size)
        self.store = parts.store.fingerprint
        self.log = SampleLog(Path(parts.recipe.run), training.steps, parts.recipe.log.interval_steps)

    @property
    def why_two_passes(self) -> str | None:
        """Why steps take two passes though the recipe would have them deferred; None if they need not."""
        if not self.scoring.defers or self.scoring.why_not_deferred:
            return self.scoring.why_not_deferred if self.scoring.defers else None
        if self.micro_steps > 1 and (self.weigher.config.normalise == "batch" or self.weigher.shuffles):
            return (
                f"the weights of a step's {self.micro_steps} micro-steps depend on each other; larger micro-batches "
                "spare the second, or weigher.normalise=window without shuffling"
            )
        return None

    @property
    def notes(self) -> list[str]:
        """What the user should know, in sentences."""
        notes = [f"two passes a step: {reason}"] if (reason := self.why_two_passes) else []
        if self.lone_samples > 0.1:
            notes.append(
                f"{self.lone_samples:.0%} of the samples are a micro-batch by themselves; raise "
                "training.micro_batch_rows, or set weigher.granularity to sample"
            )
        return notes

    def accumulate(
        self, trainer: "Trainer", batch: StepBatch, views: Views, plan: Mapping[str, float], scales: dict[str, float]
    ) -> tuple[dict[str, torch.Tensor], Weighed]:
        """Add up the weighted gradients of all micro-steps, as :meth:`Trainer.accumulate` does without weights; return
        its sums, which are not weighted, and what was done."""
        step, scorers = trainer.step, self.weigher.scorers(plan)
        if self.weigher.is_uniform(step) or not scorers:
            return trainer.accumulate(views, scales), Weighed(told=self.weigher.told(step))
        if self.by_micro_batch:
            return self._done(trainer, *weigh_micro_batches(self, trainer, views, scales))
        # The scoring objectives come first, so that they meet the same dropout in either pass.
        views = [{name: each[name] for name in sorted(each, key=lambda name: name not in scorers)} for each in views]
        factors = {name: (batch.samples / plan[name]) ** 2 for name in scorers}  # of losses whose mean is the step's
        way = self._deferred if self._is_deferred(step, scorers) else self._in_two_passes
        return self._done(trainer, *way(trainer, batch, views, scales, factors), batch)

    def _is_deferred(self, step: int, scorers: list[str]) -> bool:
        if not self.scoring.defers or self.why_two_passes:
            return False
        if self.weigher.switch and self.weigher.switch.is_due(step):
            return False  # what it measures is the gradient without weights
        return self.micro_steps == 1 or all(map(self.weigher.weighs_apart, scorers))

    def _in_two_passes(
        self, trainer: "Trainer", batch: StepBatch, views: Views, scales: dict[str, float], factors: dict[str, float]
    ) -> Found:
        step, columns = trainer.step, {name: [] for name in factors}
        for number, micro_views in enumerate(views):
            trainer.seed_dropout(number)
            for name, factor in factors.items():
                columns[name].append(self.scoring.measure(step, name, micro_views[name], scales, factor))
        measures = self._measures(batch, columns)
        if self.weigher.switch and self.weigher.switch.is_due(step):
            self._take_noise(measures, factors)
        self.engine.begin_step()
        weights = self._weights(step, measures, batch.samples)
        own = [self._own(weights, batch, micro_views, number) for number, micro_views in enumerate(views)]
        return trainer.accumulate(views, scales, own), measures, weights

    def _take_noise(self, measures: dict[str, Measures], factors: dict[str, float]) -> None:
        """Tell the switch the size of the gradient that the first pass has left, and of the samples' parts in it."""
        ((name, measured),) = measures.items()
        gradient = self.engine.restrict(self.engine.gradient(), self.scoring.parameters)
        (square,) = self.engine.inner_products([(gradient, gradient)])
        self.weigher.switch.take(factors[name] * square, measured.squares[measured.targets > 0])

    def _deferred(
        self, trainer: "Trainer", batch: StepBatch, views: Views, scales: dict[str, float], factors: dict[str, float]
    ) -> Found:
        step, columns = trainer.step, {name: [] for name in factors}
        sums = dict.fromkeys(scales, torch.zeros((), device=self.engine.device))
        for number, micro_views in enumerate(views):
            trainer.seed_dropout(number)
            for name, factor in factors.items():
                own_sums, found = self.scoring.record(step, name, micro_views[name], scales, factor)
                columns[name].append(found)
                add_sums(sums, own_sums)
            if self.micro_steps == 1:
                measures = self._measures(batch, columns)
                weights = self._weights(step, measures, batch.samples)
                own = self._own(weights, batch, micro_views, number)
            else:  # by a window, which needs no other sample of the step
                apart = {name: Measures(**_as_arrays(each[-1])) for name, each in columns.items()}
                own = self._spread(self._weights(step, apart, batch.samples), micro_views)
            loss = self.scoring.weighed({name: own[name] for name in factors})
            if rest := {name: view for name, view in micro_views.items() if name not in factors}:
                more, own_sums = self.engine(rest, scales, own)
                loss = loss + more
                add_sums(sums, own_sums)
            self.engine.backward(loss)
        if self.micro_steps > 1:
            measures = self._measures(batch, columns)
            weights = self._weights(step, measures, batch.samples)
        return sums, measures, weights

    def _measures(self, batch: StepBatch, columns: dict[str, list[Columns]]) -> dict[str, Measures]:
        return {name: Measures(**self._gather(batch, each)) for name, each in columns.items()}

    def _gather(self, batch: StepBatch, columns: list[Columns]) -> dict[str, np.ndarray]:
        """Return what all ranks have of the global batch's samples, in its order: one number a sample and column."""
        names = list(columns[0])
        whole = torch.zeros(len(names), batch.samples, dtype=torch.float64, device=self.engine.device)
        for first, own in zip(batch.first_samples, columns, strict=True):
            part = torch.stack([own[name].double() for name in names])
            whole[:, first : first + part.shape[1]] = part
        return dict(zip(names, self.engine.all_reduce(whole).numpy(), strict=True))

    def _weights(self, step: int, measures: dict[str, Measures], samples: int) -> dict[str, np.ndarray]:
        return {name: self.weigher.weights(step, name, measured, samples) for name, measured in measures.items()}

    def _own(
        self, weights: dict[str, np.ndarray], batch: StepBatch, micro_views: dict[str, View], number: int
    ) -> dict[str, torch.Tensor]:
        """Return objective → weights of a micro-step's samples, out of those of the global batch."""
        first = batch.first_samples[number]
        part = slice(first, first + len(batch.micro_batches[number].sample_ids))
        return self._spread({name: each[part] for name, each in weights.items()}, micro_views)

    def _spread(self, weights: dict[str, np.ndarray], micro_views: dict[str, View]) -> dict[str, torch.Tensor]:
        """Return objective → weights ``[S]`` float32: to each scoring objective its own, or the only one's to all."""
        own = {name: torch.from_numpy(each).float().to(self.engine.device) for name, each in weights.items()}
        if self.weigher.each:
            return own
        (only,) = own.values()
        return dict.fromkeys(micro_views, only)

    def _done(
        self,
        trainer: "Trainer",
        sums: dict[str, torch.Tensor],
        measures: dict[str, Measures],
        weights: dict[str, np.ndarray],
        batch: StepBatch | None = None,
    ) -> tuple[dict[str, torch.Tensor], Weighed]:
        """Have the weigher take up the step, and tell of it; ``batch`` if its samples were weighed."""
        step, told, due = trainer.step, self.weigher.told(trainer.step), self.log.is_due(trainer.step)
        facts = {}
        if due and batch is not None:
            own = [{"sample_ids": each.sample_ids, "lengths": each.lengths} for each in batch.micro_batches]
            facts = self._gather(batch, own)
        for name, measured in measures.items():
            if warning := self.weigher.take(step, name, measured, weights[name]):
                trainer.log.say(warning)
            if due and self.engine.rank == 0:
                columns = {"targets": measured.targets, "losses": measured.losses}
                columns |= {"scores": self.weigher.scores(measured), "weights": weights[name]}
                self.log.write(step, {"objective": name, "store": self.store, **told}, facts | columns)
        sizes = [effective_sample_size(each) for each in weights.values()]
        return sums, Weighed(sum(sizes) / len(sizes), told)

    def rehearse(self, views: dict[str, View], scales: dict[str, float]) -> None:
        """Do with one micro-batch what a step does, with weights of 1, for what it takes."""
        scorers = self.weigher.scorers(views)
        if not scorers:
            return
        if self.by_micro_batch:
            loss, _ = self.engine(views, scales)
            self.engine.backward(loss)
            config = self.weigher.config
            kept = self.micro_steps if config.gradient == "deferred" else config.halves
            while len(self.memory) < kept:
                self.memory.append(self.engine.gradient())
        elif self.scoring.defers and not self.why_two_passes:
            for name in scorers:
                self.scoring.record(0, name, views[name], scales, 1.0)
            ones = {name: torch.ones_like(views[name].batch.lengths, dtype=torch.float32) for name in scorers}
            self.engine.backward(self.scoring.weighed(ones))
        else:
            for name in scorers:
                self.scoring.measure(0, name, views[name], scales, 1.0)
        self.engine.begin_step()

    def state_dict(self) -> dict:
        """Return what the weigher has taken up."""
        return self.weigher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take up :meth:`state_dict`."""
        self.weigher.load_state_dict(state)


def _as_arrays(columns: Columns) -> dict[str, np.ndarray]:
    return {name: each.double().cpu().numpy() for name, each in columns.items()}
