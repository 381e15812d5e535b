"""The training loop. :meth:`Trainer.train_step` is the description of a step."""

import json
import math
import time
from pathlib import Path

import torch

from fused_objectives.philox import scalar_seed
from pretrain.data.batch import Batch
from pretrain.errors import RunError, UserError
from pretrain.objectives import View
from pretrain.sampling import Wish
from pretrain.sampling.tartan import MetaTartanSampler
from pretrain.training.build import Parts
from pretrain.training.early_stopping import EarlyStopping
from pretrain.training.engine import Engine
from pretrain.training.flops import FlopCounter
from pretrain.training.heldout import HeldoutProbe
from pretrain.training.log import HELDOUT_START, RunLog, SilentLog
from pretrain.training.passes import PassCounter
from pretrain.training.probe import SamplerProbe
from pretrain.training.record import StepFacts, add_sums
from pretrain.training.saving import last_checkpoint, save
from pretrain.training.stop import StopRequest
from pretrain.training.tartan import DevGradient, accumulate_apart
from pretrain.training.weighing import Weighed, Weighing


class Trainer:
    """Trains the model of some :class:`Parts` on all ranks, until the last step, until dev's score rises no more, or
    until asked to stop."""

    def __init__(self, parts: Parts, engine: Engine, stop: StopRequest):
        recipe = parts.recipe
        self.parts, self.engine, self.stop = parts, engine, stop
        self.recipe, self.config, self.run = recipe, recipe.training, Path(recipe.run)
        self.model, self.sampler = parts.model, parts.sampler
        self.initialisation: str | None = parts.initialisation
        self.loader = parts.loader(rank=engine.rank, world_size=engine.world_size)
        self.heldout = HeldoutProbe(parts, engine)
        self.probe = SamplerProbe(parts, engine)
        self.dev_gradient = DevGradient(parts, engine) if isinstance(parts.sampler, MetaTartanSampler) else None
        self.early = EarlyStopping(parts, engine)
        self.weighing = Weighing(parts, engine)
        self.flops = FlopCounter(parts, engine)
        self.passes = PassCounter(parts.model)
        self.log: RunLog | SilentLog = SilentLog()
        self.step = self.tokens = self.skipped = self.skipped_in_a_row = 0
        self.stopping = False

    def train(self) -> None:
        """Run the remaining steps; save at intervals, at the end, and when asked to stop."""
        if self.step == 0 and self.heldout:
            self.note_start(self.heldout.losses())
        while not self.finished and not self.stopping:
            record = self.train_step()
            if self.early.is_due(self.step):
                record["dev"] = self.early.score(self.step)
            if self.heldout_is_due():
                record["heldout"] = self.heldout.losses()
            self.log.step(record)
            if self.save_is_due():
                save(self)

    def train_step(self) -> dict:
        """Do one optimizer step on one global batch and return its record."""
        began = time.monotonic()
        batch = self.loader.next()
        lesson = self.teach_sampler()
        plan, probabilities = self.sampler.plan(self.step), self.sampler.probabilities(self.step)
        views = [self.corrupt(micro_batch, plan) for micro_batch in batch.micro_batches]
        targets, tallies = self.count(views)
        scales = self.loss_scales(plan, targets)

        self.engine.begin_step()
        self.passes.restart()
        weighed = Weighed()
        if self.sampler.wish(self.step) is Wish.STEP:
            sums, lesson = accumulate_apart(self, views, plan, targets)
        else:
            sums, weighed = self.weighing.accumulate(self, batch, views, plan, scales)
        sums = self.agree(sums)

        learning_rate = self.config.optimizer.learning_rate * self.config.schedule.factor(self.step, self.config.steps)
        grad_norm = self.update(plan, sums, learning_rate)
        self.step, self.tokens = self.step + 1, self.tokens + batch.tokens

        seconds = time.monotonic() - began
        numbers = learning_rate, grad_norm, seconds, weighed.effective_sample_size
        facts = StepFacts(batch, plan, probabilities, targets, tallies, sums, *numbers)
        if grad_norm is not None:
            self.sampler.observe(self.step - 1, plan, facts.losses(self.model.objectives))
        return {
            "step": self.step,
            **facts.record(self.model.objectives),
            "sampler": lesson,
            "weigher": weighed.told,
            "tokens_seen": self.tokens,
            "skipped": self.skipped,
            "passes": self.passes.a_micro_step(len(views)),
            "mfu": self.flops.utilisation(plan, batch.tokens, seconds),
        }

    def teach_sampler(self) -> dict[str, dict[str, float]]:
        """Measure what the sampler wants to know before it plans the step; return what the log tells of it."""
        wish = self.sampler.wish(self.step)
        if wish is None or wish is Wish.STEP:
            return {}
        return self.sampler.learn(self.step, self.probe.measure(wish))

    def corrupt(self, batch: Batch, plan: dict[str, float]) -> dict[str, View]:
        """Return each planned objective's view of a micro-batch."""
        batch, progress = batch.to(self.engine.device), self.step / self.config.steps
        return {name: self.model.objectives[name].corrupt(batch, progress) for name in plan}

    def count(self, views: list[dict[str, View]]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the targets of each term and the objectives' tallies in the global batch: over all ranks and
        micro-steps."""
        targets: dict[str, torch.Tensor] = {}
        tallies: dict[str, torch.Tensor] = {}
        for view in (view for micro_views in views for view in micro_views.values()):
            for term, counts in view.counts.items():
                targets[term] = targets.get(term, 0) + counts.sum()
            for name, number in view.tallies.items():
                tallies[name] = tallies.get(name, 0) + number
        totals = self.engine.all_reduce(torch.stack([*targets.values(), *tallies.values()])).tolist()
        return dict(zip(targets, totals, strict=False)), dict(zip(tallies, totals[len(targets) :], strict=True))

    def loss_scales(self, plan: dict[str, float], targets: dict[str, float]) -> dict[str, float]:
        """Return term → what a sum of losses is multiplied with: share × weight / global count."""
        return {
            term: share * weight / max(targets[term], 1.0)
            for name, share in plan.items()
            for term, weight in self.model.objectives[name].terms.items()
        }

    def accumulate(
        self,
        views: list[dict[str, View]],
        scales: dict[str, float],
        weights: list[dict[str, torch.Tensor]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Add up the gradients of all micro-steps, each with its ``weights`` (objective → ``[S]`` float32) if there are
        any; return this rank's sums of losses, a scalar a term, without weights."""
        sums = dict.fromkeys(scales, torch.zeros((), device=self.engine.device))
        for number, micro_views in enumerate(views):
            self.seed_dropout(number)
            loss, sample_sums = self.engine(micro_views, scales, weights[number] if weights else None)
            self.engine.backward(loss)
            add_sums(sums, sample_sums)
        return sums

    def seed_dropout(self, micro_step: int) -> None:
        """Make dropout a function of (seed, step, micro-step, rank), so that a resumed run repeats it."""
        torch.manual_seed(scalar_seed(self.recipe.seed, "dropout", self.step, micro_step, self.engine.rank))

    def agree(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Add the sums of losses over all ranks, and agree on whether any rank was asked to stop."""
        flag = torch.tensor(float(self.stop.requested), device=self.engine.device)
        *totals, stops = self.engine.all_reduce(torch.stack([*sums.values(), flag])).tolist()
        self.stopping = stops > 0
        return dict(zip(sums, totals, strict=True))

    def update(self, plan: dict[str, float], sums: dict[str, float], learning_rate: float) -> float | None:
        """Update what the plan trains; return the gradient's norm, or None if the step was skipped on all ranks.

        Raises:
            RunError: after ``training.non_finite_limit`` skipped steps in a row.
        """
        if all(math.isfinite(total) for total in sums.values()):
            outcome = self.engine.step(learning_rate, self.model.trained_by(list(plan)))
            if outcome.applied:
                self.skipped_in_a_row = 0
                return outcome.grad_norm
        else:
            self.engine.skip_step()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.non_finite_limit:
            raise RunError(
                f"step {self.step + 1}: loss or gradient not finite for {self.skipped_in_a_row} steps in a row "
                "(training.non_finite_limit); lower the learning rate; "
                f"last good checkpoint: {last_checkpoint(self.run)}"
            )
        return None

    @property
    def finished(self) -> bool:
        """Whether the run has had its last step."""
        return self.step >= self.config.steps or self.early.exhausted

    def heldout_is_due(self) -> bool:
        """Whether held-out losses belong to the step just done."""
        interval = self.recipe.heldout.interval_steps
        due = interval > 0 and self.step % interval == 0 and not self.stopping  # who asks to stop may not wait
        return bool(self.heldout) and (due or self.finished)

    def save_is_due(self) -> bool:
        """Whether the step just done is one to save."""
        best = bool(self.early) and self.early.best_step == self.step
        return self.stopping or self.finished or best or self.step % self.recipe.checkpoint.interval_steps == 0

    def note_start(self, losses: dict[str, float]) -> None:
        """Say and keep the held-out losses of the untrained model."""
        self.log.say("before training | held-out " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        if self.engine.rank == 0:
            (self.run / HELDOUT_START).write_text(json.dumps(losses) + "\n")

    def state_dict(self) -> dict:
        """Return all that decides how the run goes on, besides the engine's states; the same on every rank."""
        counters = {name: getattr(self, name) for name in ("step", "tokens", "skipped", "skipped_in_a_row")}
        data = {name: each.fingerprint for name, each in self.model.objectives.items() if each.fingerprint}
        stateful = {"loader": self.loader, "sampler": self.sampler, "probe": self.probe, "stopping": self.early}
        stateful["weighing"] = self.weighing
        states = {name: each.state_dict() for name, each in stateful.items()}
        return {**counters, **states, "objective_data": data, "initialisation": self.initialisation}

    def load_state_dict(self, state: dict) -> None:
        """Take up :meth:`state_dict`.

        Raises:
            UserError: if an objective's own data, or the store, is not that of the checkpoint.
        """
        for name, objective in self.model.objectives.items():
            if objective.fingerprint != state.get("objective_data", {}).get(name):
                raise UserError(f"objectives.{name}: other data than the checkpoint's; start a new run folder (run=…)")
        self.initialisation = state.get("initialisation")
        self.loader.load_state_dict(state["loader"])
        self.sampler.load_state_dict(state["sampler"])
        self.probe.load_state_dict(state.get("probe", {}))
        self.early.load_state_dict(state.get("stopping", self.early.state_dict()))
        self.weighing.load_state_dict(state.get("weighing", self.weighing.state_dict()))
        for name in ("step", "tokens", "skipped", "skipped_in_a_row"):
            setattr(self, name, state[name])
