"""The loop that learns a masking policy: every step hides what the policy chooses, and asks whether that helped."""

import math
import time
from dataclasses import replace

import torch
from torch import nn

from fused_objectives.targets import IGNORED
from pretrain.data.batch import Batch
from pretrain.data.output import whole_folder
from pretrain.errors import UserError
from pretrain.masking.learning.extractor import CARD, Card, Extractor
from pretrain.masking.learning.meta_gradient import Alignment, Masked, alignment_by_mask, mask_gradient
from pretrain.objectives.base import LabelledView, View
from pretrain.training.record import StepFacts
from pretrain.training.trainer import Trainer

PLAN = {"mlm": 1.0, "end_task": 1.0, "policy": 1.0}
LONGEST_SPAN = 10  # tokens, of the policy's spans


class MetaTrainer(Trainer):
    """Trains policy, backbone and the end task's head together (arXiv 2104.08840, section on meta-learning).

    A step draws masks, measures what each token's being hidden does to ⟨∇L_task, ∇L_mlm⟩, and then updates all three at
    once: the backbone takes the step of masked language modelling for real, so the next step starts from θ'; the head
    follows the backbone; the policy goes where the end task gains.
    """

    def __init__(self, parts, engine, stop):
        super().__init__(parts, engine, stop)
        if engine.stage == 3:
            raise UserError(
                "--ds_config: zero_optimization.stage 3 cuts the weights, which a meta step moves as a whole; "
                "use stage 0, 1 or 2"
            )
        if engine.dtype != torch.float32:
            raise UserError(
                "--ds_config: bf16 is too coarse for a meta step, the difference of two gradients; "
                "set bf16.enabled to false"
            )
        self.objectives = parts.model.objectives
        self.shared = list(self.model.encoder.parameters())

    def train(self) -> None:
        super().train()
        if self.step >= self.config.steps:
            self.write_policy()

    def train_step(self) -> dict:
        began = time.monotonic()
        batch = self.loader.next()
        micro_batches = [each.to(self.engine.device) for each in batch.micro_batches]
        rate = self.objectives["mlm"].config.masking.rate.at(self.step / self.config.steps)
        views = [self.draw(each, rate) for each in micro_batches]
        targets, tallies = self.count(views)
        scales = self.loss_scales(PLAN, targets) | {"policy": 1.0}
        alignment, norm = self.align(views, targets)
        credits = self.credits(views, alignment)
        views = [
            each | {"policy": replace(each["policy"], credit=credit)}
            for each, credit in zip(views, credits, strict=True)
        ]

        self.engine.begin_step()
        sums = dict.fromkeys(targets, 0.0)
        for number, micro_views in enumerate(views):
            self.seed_dropout(number)
            loss, sample_sums = self.engine(micro_views, scales)
            self.engine.backward(loss)
            for term, per_sample in sample_sums.items():
                sums[term] = sums[term] + per_sample.sum()
        sums = self.agree(sums)

        learning_rate = self.config.optimizer.learning_rate * self.config.schedule.factor(self.step, self.config.steps)
        grad_norm = self.update(PLAN, sums, learning_rate)
        self.step, self.tokens = self.step + 1, self.tokens + batch.tokens
        seconds = time.monotonic() - began
        facts = StepFacts(batch, PLAN, PLAN, targets, tallies, sums, learning_rate, grad_norm, seconds)
        meta = {"alignment": float(alignment.value), "task_gradient_norm": norm}
        return {
            "step": self.step,
            **facts.record(self.objectives),
            "meta": meta,
            "tokens_seen": self.tokens,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def draw(self, batch: Batch, rate: float) -> dict[str, View]:
        """Return the step's views of a micro-batch, with masks that the policy draws as it is now."""
        policy, mlm = self.objectives["policy"], self.objectives["mlm"]
        hidden = policy.relaxed(self.model.heads["policy"], batch, rate).hard
        mask_id = policy.vocabulary.mask_id
        places, samples = batch.tokens.numel(), len(batch.sample_ids)
        capacity = min(places, math.ceil(rate * places) + samples) if batch.tokens.is_cuda else None
        masked = LabelledView(
            batch=batch,
            tokens=torch.where(hidden, mask_id, batch.tokens),
            counts={mlm.name: batch.sum_per_sample(hidden.long())},
            tallies={},
            labels=torch.where(hidden, batch.tokens, IGNORED),
            capacity=capacity,
        )
        progress = self.step / self.config.steps
        return {
            "mlm": masked,
            "end_task": self.objectives["end_task"].corrupt(batch, progress),
            "policy": replace(policy.corrupt(batch, progress), rate=rate),
        }

    def credits(self, views: list[dict[str, View]], alignment: Alignment) -> list[torch.Tensor]:
        """Return the credit of every micro-batch's tokens, ``[rows, length]`` float32."""
        if self.objectives["policy"].config.credit == "all":
            return alignment.by_mask
        return [
            torch.where(each["mlm"].labels != IGNORED, by_weight, 0.0)
            for each, by_weight in zip(views, alignment.by_weight, strict=True)
        ]

    def align(self, views: list[dict[str, View]], targets: dict[str, float]) -> tuple[Alignment, float]:
        """Return how the masks of all micro-batches act on ⟨∇L_task, ∇L_mlm⟩ over the global batch, and ‖∇L_task‖;
        without dropout."""
        self.model.eval()
        try:
            direction = self.task_gradient(views, targets)
            alignment = alignment_by_mask(
                self.shared, direction, lambda: self.mask_gradients(views), targets["mlm"], self.sum_over_ranks
            )
        finally:
            self.model.train()
        return alignment, float(nn.utils.get_total_norm(direction))

    def task_gradient(self, views: list[dict[str, View]], targets: dict[str, float]) -> list[torch.Tensor]:
        """Return the gradient of the end task's mean loss over the global batch by the backbone's weights."""
        task = self.objectives["end_task"].of_backbone
        total = [torch.zeros_like(each) for each in self.shared]
        for each in views:
            loss = task.loss(self.model, each["end_task"])[task.name].total / max(targets[task.name], 1.0)
            found = torch.autograd.grad(loss, self.shared, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, found)
        flat = self.sum_over_ranks(torch.cat([each.reshape(-1) for each in total]))
        parts = flat.split([each.numel() for each in total])
        return [part.view_as(each) for part, each in zip(parts, total, strict=True)]

    def mask_gradients(self, views: list[dict[str, View]]) -> list:
        """Differentiate the masked loss by its masks, with the weights as they are."""
        policy, encoder, head = self.objectives["policy"], self.model.encoder, self.model.heads["vocabulary"]
        found = []
        for each in views:
            batch, mask = each["mlm"].batch, (each["mlm"].labels != IGNORED).float()
            masked = Masked(batch, mask, policy.eligible(batch))
            found.append(mask_gradient(encoder, head, masked, policy.vocabulary.mask_id, policy.impl))
        return found

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over ranks, in place; the same bits on all of them."""
        torch.distributed.all_reduce(values)
        return values

    def write_policy(self) -> None:
        """Write the policy as a folder that ``medley annotate … learned --model`` reads."""
        if self.engine.rank == 0:
            rate = self.objectives["mlm"].config.masking.rate.at(1.0)
            longest = self.parts.store.max_length
            card = Card("meta", max_length=longest, max_span=LONGEST_SPAN, top_k=max(1, round(rate * longest)))
            network = self.model.heads["policy"]
            with whole_folder(self.run / "policy", overwrite=True, marks=(CARD,)) as partial:
                Extractor(network.extractor, self.parts.tokenizer).save(partial, card)
            self.log.say(f"wrote the policy to {self.run / 'policy'}")
        self.engine.barrier()
