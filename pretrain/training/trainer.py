"""The training loop. :meth:`Trainer.train_step` is the description of a step."""

import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from pretrain.data.batch import Batch
from pretrain.data.loader import StepBatch
from pretrain.errors import RunError, UserError
from pretrain.objectives import View
from pretrain.philox import scalar_seed
from pretrain.training import checkpoint
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.flops import FlopCounter
from pretrain.training.heldout import HeldoutProbe
from pretrain.training.log import HELDOUT_START, RunLog, SilentLog
from pretrain.training.stop import StopRequest

STATE = "trainer.json"


class Trainer:
    """Trains the model of some :class:`Parts` on all ranks, until the last step or until asked to stop."""

    def __init__(self, parts: Parts, engine: Engine, stop: StopRequest):
        recipe = parts.recipe
        self.parts, self.engine, self.stop = parts, engine, stop
        self.recipe, self.config, self.run = recipe, recipe.training, Path(recipe.run)
        self.model, self.sampler = parts.model, parts.sampler
        self.loader = parts.loader(rank=engine.rank, world_size=engine.world_size)
        self.heldout = HeldoutProbe(parts, engine)
        self.flops = FlopCounter(parts, engine)
        self.log: RunLog | SilentLog = SilentLog()
        self.step = self.tokens = self.skipped_in_a_row = self.skipped = 0
        self.stopping = False

    # ------------------------------------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Run the remaining steps; save at intervals, at the end, and when asked to stop."""
        if self.step == 0 and self.heldout:
            losses = self.heldout.losses()
            self.log.say("before training | held-out " + " ".join(f"{n} {loss:.4f}" for n, loss in losses.items()))
            self._note_start(losses)
        while self.step < self.config.steps and not self.stopping:
            record = self.train_step()
            if self._heldout_is_due():
                record["heldout"] = self.heldout.losses()
            self.log.step(record)
            if (
                self.stopping
                or self.step == self.config.steps
                or self.step % self.recipe.checkpoint.interval_steps == 0
            ):
                self.save()

    def train_step(self) -> dict:
        """Do one optimizer step on one global batch and return its record."""
        began = time.monotonic()
        batch = self.loader.next()
        plan = self.sampler.plan(self.step)
        views = [self.corrupt(micro_batch, plan) for micro_batch in batch.micro_batches]
        counts = self.count_targets(views)
        scales = self.loss_scales(plan, counts)

        self.engine.begin_step()
        sums = dict.fromkeys(counts, 0.0)
        for number, micro_views in enumerate(views):
            self.seed_dropout(number)
            loss, sample_sums = self.engine(micro_views, scales)
            self.engine.backward(loss)
            for term, per_sample in sample_sums.items():
                sums[term] = sums[term] + per_sample.sum()
        sums = self.agree(sums)

        learning_rate = self.config.optimizer.learning_rate * self.config.schedule.factor(self.step, self.config.steps)
        grad_norm = self.update(sums, plan, learning_rate)
        probabilities = self.sampler.probabilities(self.step)
        self.step += 1
        return self.record(batch, plan, probabilities, counts, sums, learning_rate, grad_norm, time.monotonic() - began)

    # -------------------------------------------------------------------------------------- the parts of a step

    def corrupt(self, batch: Batch, plan: dict[str, float]) -> dict[str, View]:
        """Return each planned objective's view of a micro-batch."""
        batch, progress = batch.to(self.engine.device), self.step / self.config.steps
        return {name: self.model.objectives[name].corrupt(batch, progress) for name in plan}

    def count_targets(self, views: list[dict[str, View]]) -> dict[str, float]:
        """Return term → targets in the global batch: all ranks, all micro-steps."""
        terms = [term for view in views[0].values() for term in view.counts]
        local = [
            sum(view.counts[term].sum() for views_ in views for view in views_.values() if term in view.counts)
            for term in terms
        ]
        return dict(zip(terms, self.engine.all_reduce(torch.stack(local)).tolist(), strict=True))

    def loss_scales(self, plan: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Return term → what a sum of losses is multiplied with: share × weight / global count."""
        return {
            term: share * weight / max(counts[term], 1.0)
            for name, share in plan.items()
            for term, weight in self.model.objectives[name].terms.items()
        }

    def seed_dropout(self, micro_step: int) -> None:
        """Make dropout a function of (seed, step, micro-step, rank), so that a resumed run repeats it."""
        torch.manual_seed(scalar_seed(self.recipe.seed, "dropout", self.step, micro_step, self.engine.rank))

    def agree(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Add the sums of losses over all ranks, and agree on whether any rank was asked to stop."""
        flag = torch.tensor(float(self.stop.requested), device=self.engine.device)
        *totals, stops = self.engine.all_reduce(torch.stack([*sums.values(), flag])).tolist()
        self.stopping = stops > 0
        return dict(zip(sums, totals, strict=True))

    def update(self, sums: dict[str, float], plan: dict[str, float], learning_rate: float) -> float | None:
        """Update what the plan trains; return the gradient's norm, or None if the step was skipped on all ranks."""
        grad_norm = None
        if all(math.isfinite(total) for total in sums.values()):
            outcome = self.engine.step(learning_rate, self.model.trained_by(list(plan)))
            grad_norm = outcome.grad_norm if outcome.applied else None
        else:
            self.engine.skip_step()
        if grad_norm is not None:
            self.skipped_in_a_row = 0
            return grad_norm
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.non_finite_limit:
            last = next(iter(checkpoint.candidates(self.run)), None)
            raise RunError(
                f"step {self.step + 1}: loss or gradient not finite for {self.skipped_in_a_row} steps in a row "
                f"(training.non_finite_limit); lower the learning rate; last good checkpoint: {last or 'none'}"
            )
        return None

    def record(
        self,
        batch: StepBatch,
        plan: dict[str, float],
        probabilities: dict[str, float],
        counts: dict[str, float],
        sums: dict[str, float],
        learning_rate: float,
        grad_norm: float | None,
        seconds: float,
    ) -> dict:
        """Return the step's line of ``metrics.jsonl``; fields are described in docs/formats.md."""
        means = {term: total / max(counts[term], 1.0) for term, total in sums.items()}
        losses = {
            name: sum(weight * means[term] for term, weight in self.model.objectives[name].terms.items())
            for name in plan
        }
        self.tokens += batch.tokens
        return {
            "step": self.step,
            "loss": sum(share * losses[name] for name, share in plan.items()),
            "losses": losses,
            "terms": means,
            "targets": {term: int(count) for term, count in counts.items()},
            "plan": plan,
            "probabilities": probabilities,
            "effective_sample_size": 1.0,
            "lr": learning_rate,
            "grad_norm": grad_norm,
            "skipped": self.skipped,
            "tokens": batch.tokens,
            "tokens_seen": self.tokens,
            "samples": batch.samples,
            "sample_ids_sha256": batch.sample_ids_sha256,
            "seconds": seconds,
            "tokens_per_second": batch.tokens / seconds,
            "mfu": self.flops.utilisation(plan, batch.tokens, seconds),
        }

    def _heldout_is_due(self) -> bool:
        interval = self.recipe.heldout.interval_steps
        last = self.step == self.config.steps
        return bool(self.heldout) and (last or (interval > 0 and self.step % interval == 0))

    def _note_start(self, losses: dict[str, float]) -> None:
        if self.engine.rank == 0:
            (self.run / HELDOUT_START).write_text(json.dumps(losses) + "\n")

    # ----------------------------------------------------------------------------------------- saving and resuming

    def save(self) -> None:
        """Write a checkpoint; all ranks call it."""
        partial = checkpoint.partial_folder(self.run, self.step)
        try:
            if self.engine.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.engine.barrier()
            self.engine.save(partial / "engine")
            if self.engine.rank == 0:
                self._save_facts(partial)
                facts = {"world_size": self.engine.world_size, "zero_stage": self.engine.stage}
                self.log.say(f"saved {checkpoint.publish(self.run, self.step, facts)}")
                checkpoint.prune(self.run, self.recipe.checkpoint.keep)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            last = next(iter(checkpoint.candidates(self.run)), None)
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"step {self.step}: cannot save a checkpoint: {reason}; last good one: {last or 'none'}"
            ) from error
        self.engine.barrier()

    def _save_facts(self, folder: Path) -> None:
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loader": self.loader.state_dict(),
            "sampler": self.sampler.state_dict(),
        }
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
        self.recipe.save(folder / "config.yaml")
        self.model.encoder.config.save_pretrained(folder / "model")
        self.parts.tokenizer.save_pretrained(folder / "model")

    def resume(self, folder: Path) -> None:
        """Take up a checkpoint that :func:`pretrain.training.checkpoint.verify` has passed; all ranks call it."""
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        for key, now in (("world_size", self.engine.world_size), ("zero_stage", self.engine.stage)):
            if manifest[key] != now:
                raise UserError(
                    f"{folder}: saved with {key} {manifest[key]}, this run has {now}; "
                    f"resuming on another {key.replace('_', ' ')} is not supported yet"
                )
        state = json.loads((folder / STATE).read_text())
        self.loader.load_state_dict(state["loader"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.engine.load(folder / "engine")
