"""Weighing the samples of a step: what is measured of them, and how the gradient Σ w · g is come by.

*Two passes*: the first scores the samples and its gradients are forgotten, the second is an ordinary one with weights.
*Deferred*: one forward and one backward, which keeps what the gradients are made of until the weights are known.
Micro-batches are weighed in ``micro_batches.py``.
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
from pretrain.influence.ghost import GhostNorms
from pretrain.influence.presence import MICROBATCH
from pretrain.influence.sample_log import SampleLog
from pretrain.influence.weights import effective_sample_size
from pretrain.objectives import View
from pretrain.sampling import Wish
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.micro_batches import check_micro_batches, weigh_micro_batches

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer


@dataclass(frozen=True)
class Weighed:
    """What weighing did in a step."""

    effective_sample_size: float = 1.0
    """As a fraction of the samples (or micro-batches); of several scoring objectives the mean."""
    told: dict[str, float] = field(default_factory=dict)
    """What the log tells of the weigher."""


Columns = dict[str, torch.Tensor]
"""What was measured → ``[S]`` of a micro-step's samples, by the fields of :class:`Measures`."""


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
    if weigher.measures == "norms":
        _ghosts(parts)
    if _by_micro_batch(parts):
        check_micro_batches(parts, world_size)


def _ghosts(parts: Parts) -> dict[str, GhostNorms]:
    """Return objective → what finds its samples' norms; each keeps a record of its own."""
    config, recipe = parts.weigher.config, parts.recipe
    keys = {"sketch_size": config.sketch_size, "seed": recipe.seed, "impl": recipe.impl}
    return {name: GhostNorms(parts.model, config.layers, config.score, **keys) for name in parts.weigher.scoring}


def _by_micro_batch(parts: Parts) -> bool:
    return getattr(parts.weigher.config, "granularity", None) == MICROBATCH


class Weighing:
    """Accumulates the gradients of steps whose samples are weighed; all ranks make the same calls."""

    def __init__(self, parts: Parts, engine: Engine):
        self.weigher, self.engine, self.objectives = parts.weigher, engine, parts.model.objectives
        self.config, training = parts.weigher.config, parts.recipe.training
        self.by_micro_batch = _by_micro_batch(parts)
        self.ghosts = _ghosts(parts) if self.weigher.measures == "norms" else {}
        self.parameters = [each for ghost in list(self.ghosts.values())[:1] for each in ghost.parameters]
        """K's, by which gradients are measured as a whole."""
        self.recomputes = parts.recipe.model.activation_checkpointing
        self.micro_steps = training.batch_rows // (training.micro_batch_rows * engine.world_size)
        self.store = parts.store.fingerprint
        self.log = SampleLog(Path(parts.recipe.run), training.steps, parts.recipe.log.interval_steps)

    @property
    def why_two_passes(self) -> str | None:
        """Why steps take two passes though the recipe would have them deferred; None if they need not."""
        if self.by_micro_batch or not self.ghosts or self.config.gradient != "deferred":
            return None
        if self.engine.stage == 3:
            return "ZeRO stage 3 takes away the weights that a deferred gradient needs"
        if self.recomputes:
            return "model.activation_checkpointing forgets what a deferred gradient is made of"
        if reason := next((ghost.why_not_deferred for ghost in self.ghosts.values() if ghost.why_not_deferred), None):
            return reason
        if self.micro_steps > 1 and (self.config.normalise == "batch" or self.weigher.shuffles):
            return (
                f"the weights of a step's {self.micro_steps} micro-steps depend on each other; larger micro-batches "
                "spare the second, or weigher.normalise=window without shuffling"
            )
        return None

    @property
    def notes(self) -> list[str]:
        """What the user should know, in sentences."""
        return [f"two passes a step: {reason}"] if (reason := self.why_two_passes) else []

    def state_dict(self) -> dict:
        """Return what the weigher has taken up."""
        return self.weigher.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take up :meth:`state_dict`."""
        self.weigher.load_state_dict(state)

    def accumulate(
        self,
        trainer: "Trainer",
        batch: StepBatch,
        views: list[dict[str, View]],
        plan: Mapping[str, float],
        scales: dict[str, float],
    ) -> tuple[dict[str, torch.Tensor], Weighed]:
        """Add up the weighted gradients of all micro-steps, as :meth:`Trainer.accumulate` does without weights; return
        its sums, which are not weighted, and what was done."""
        step, scorers = trainer.step, self.weigher.scorers(plan)
        if self.weigher.is_uniform(step) or not scorers:
            return trainer.accumulate(views, scales), Weighed(told=self.weigher.told(step))
        if self.by_micro_batch:
            sums, measures, weights = weigh_micro_batches(self, trainer, views, scales)
            return sums, self._done(trainer, {MICROBATCH: measures}, {MICROBATCH: weights})
        # The scoring objectives come first, so that they meet the same dropout in either pass.
        views = [{name: each[name] for name in sorted(each, key=lambda name: name not in scorers)} for each in views]
        factors = {name: (batch.samples / plan[name]) ** 2 for name in scorers}
        accumulate = self._deferred if self._is_deferred(step, scorers) else self._in_two_passes
        sums, measures, weights = accumulate(trainer, batch, views, scales, factors)
        return sums, self._done(trainer, measures, weights, batch)

    def _is_deferred(self, step: int, scorers: list[str]) -> bool:
        if self.weigher.measures != "norms" or self.config.gradient != "deferred" or self.why_two_passes:
            return False
        if self.weigher.switch and self.weigher.switch.is_due(step):
            return False  # what it measures is the gradient without weights
        return self.micro_steps == 1 or all(map(self.weigher.weighs_apart, scorers))

    def _in_two_passes(self, trainer, batch, views, scales, factors):
        found: dict[str, list[Columns]] = {name: [] for name in factors}
        for number, micro_views in enumerate(views):
            trainer.seed_dropout(number)
            for name in factors:
                found[name].append(self._score(trainer.step, name, micro_views[name], scales, factors[name]))
        measures = self._measures(batch, found)
        if self.weigher.switch and self.weigher.switch.is_due(trainer.step):
            self._take_noise(measures, factors)
        self.engine.begin_step()
        weights = self._weights(trainer.step, measures, batch.samples)
        own = [self._own(weights, batch, views, number) for number in range(len(views))]
        return trainer.accumulate(views, scales, own), measures, weights

    def _score(self, step: int, name: str, view: View, scales: dict[str, float], factor: float) -> Columns:
        """Run one objective on a micro-batch; with norms its gradient is left behind."""
        if self.weigher.measures == "losses":
            with torch.no_grad():
                _, sums = self.engine({name: view}, scales)
            return self._columns(name, view, sums)
        ghost = self.ghosts[name]
        with ghost.recording(view.batch, deferred=False, step=step):
            loss, sums = self.engine({name: view}, scales)
            self.engine.backward(loss)
        squares = ghost.squared_norms() / self.engine.world_size**2  # with which the engine multiplies
        return self._columns(name, view, sums) | {"squares": factor * squares}

    def _take_noise(self, measures: dict[str, Measures], factors: dict[str, float]) -> None:
        """Tell the switch the size of the gradient that the first pass has left, and of its samples' parts."""
        ((name, measured),) = measures.items()
        gradient = self.engine.restrict(self.engine.gradient(), self.parameters)
        (square,) = self.engine.inner_products([(gradient, gradient)])
        self.weigher.switch.take(factors[name] * square, measured.squares[measured.targets > 0])

    def _deferred(self, trainer, batch, views, scales, factors):
        found: dict[str, list[Columns]] = {name: [] for name in factors}
        sums = dict.fromkeys(scales, torch.zeros((), device=self.engine.device))
        for number, micro_views in enumerate(views):
            trainer.seed_dropout(number)
            for name, factor in factors.items():
                ghost, view = self.ghosts[name], micro_views[name]
                with ghost.recording(view.batch, deferred=True, step=trainer.step):
                    loss, own_sums = self.engine.run_apart({name: view}, scales)
                    torch.autograd.backward(loss)
                found[name].append(self._columns(name, view, own_sums) | {"squares": factor * ghost.squared_norms()})
                add_sums(sums, own_sums)
            if self.micro_steps == 1:
                measures = self._measures(batch, found)
                weights = self._own(self._weights(trainer.step, measures, batch.samples), batch, views, number)
            else:
                measures = {name: _as_measures(columns[-1]) for name, columns in found.items()}
                apart = self._weights(trainer.step, measures, batch.samples)
                weights = self._spread(apart, micro_views)
            loss = sum(self.ghosts[name].injected(weights[name]) for name in factors)
            if rest := {name: view for name, view in micro_views.items() if name not in factors}:
                more, own_sums = self.engine(rest, scales, weights)
                loss = loss + more
                add_sums(sums, own_sums)
            self.engine.backward(loss)
        measures = self._measures(batch, found)
        return sums, measures, self._weights(trainer.step, measures, batch.samples)

    def _columns(self, name: str, view: View, sums: dict[str, torch.Tensor]) -> Columns:
        """Return a micro-batch's targets, and the mean losses of an objective whose sums are ``sums``."""
        terms = self.objectives[name].terms
        losses = (weight * sums[term] / view.counts[term].clamp(min=1) for term, weight in terms.items())
        return {"targets": sum(view.counts[term] for term in terms), "losses": sum(losses)}

    def _measures(self, batch: StepBatch, found: dict[str, list[Columns]]) -> dict[str, Measures]:
        return {name: Measures(**self._gather(batch, columns)) for name, columns in found.items()}

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

    def _own(self, weights: dict[str, np.ndarray], batch: StepBatch, views, number: int) -> dict[str, torch.Tensor]:
        """Return objective → weights of a micro-step's samples, of those of the global batch."""
        first = batch.first_samples[number]
        part = slice(first, first + len(batch.micro_batches[number].sample_ids))
        return self._spread({name: each[part] for name, each in weights.items()}, views[number])

    def _spread(self, weights: dict[str, np.ndarray], micro_views: dict[str, View]) -> dict[str, torch.Tensor]:
        """Return objective → weights ``[S]`` float32: each scoring objective's own, or the only one's for all."""
        own = {name: torch.from_numpy(each).float().to(self.engine.device) for name, each in weights.items()}
        return own if self.weigher.each else dict.fromkeys(micro_views, *own.values())

    def _done(
        self,
        trainer: "Trainer",
        measures: dict[str, Measures],
        weights: dict[str, np.ndarray],
        batch: StepBatch | None = None,
    ) -> Weighed:
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
        return Weighed(sum(sizes) / len(sizes), told)


def _as_measures(columns: Columns) -> Measures:
    return Measures(**{name: each.double().cpu().numpy() for name, each in columns.items()})


def add_sums(sums: dict[str, torch.Tensor], of_samples: dict[str, torch.Tensor]) -> None:
    """Add a micro-step's losses, term → ``[S]``, to the sums, term → ``[]``."""
    for term, per_sample in of_samples.items():
        sums[term] = sums[term] + per_sample.sum()
