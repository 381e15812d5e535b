"""The step of META-TARTAN (arXiv 2109.07437): every objective's gradient by itself, compared with that of the end task
on its dev split."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fused_objectives.philox import scalar_seed
from pretrain.data.batch import Batch
from pretrain.data.order import shuffled
from pretrain.model.multi_objective import BACKBONE, MultiObjectiveModel
from pretrain.objectives import View
from pretrain.objectives.base import TermLoss
from pretrain.objectives.end_task import EndTask, TaskHead
from pretrain.sampling import Measured
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.gradient import Gradient

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

SMALLEST_MOVE = 1e-3  # of the dev head's loss from step to step; below it the head is fitted
HEAD_DECAY, HEAD_BETAS = 0.1, (0.9, 0.98)  # of AdamW for the dev head


def accumulate_apart(
    trainer: "Trainer", views: list[dict[str, View]], plan: dict[str, float], targets: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Accumulate what :meth:`Trainer.accumulate` would, one objective after another, and let the sampler learn from how
    each gradient agrees with the dev gradient; return the sums of losses and what the log tells."""
    engine = trainer.engine
    direction = trainer.dev_gradient.measure(trainer.step)
    total, sums, products, squares, square = None, {}, {}, {}, 0.0
    for name, share in plan.items():
        engine.begin_step()
        scales = trainer.loss_scales({name: 1.0}, targets)
        sums |= trainer.accumulate([{name: each[name]} for each in views], scales)
        own = engine.gradient()
        pairs = [(direction, own), (own, own), (direction, direction)]
        products[name], squares[name], square = engine.inner_products(pairs, [BACKBONE])
        total = Gradient.combine([own], [share]) if total is None else Gradient.combine([total, own], [1.0, share])
    engine.put_gradient(total)
    measured = Measured(products=products, squares=squares, direction_square=square)
    return sums, trainer.sampler.learn(trainer.step, measured)


@dataclass(frozen=True)
class DevView:
    """Labelled samples of the dev split, one a row."""

    drawn: Batch
    labels: torch.Tensor
    counted: torch.Tensor
    """``[drawn]`` bool: False where the place is only filled."""


class DevLoss:
    """The end task's loss under a head that is no part of the model."""

    def __init__(self, task: EndTask, head: torch.nn.Module):
        self.task, self.head = task, head

    def loss(self, model: MultiObjectiveModel, view: DevView, weights: None = None) -> dict[str, TermLoss]:
        """Return the sum over the samples that count."""
        features = self.task.features(model.encoder, view.drawn).float()
        losses = self.task.losses(self.head(features), view.labels) * view.counted
        return {"dev": TermLoss(losses.sum(), losses.detach())}


class DevGradient:
    """The gradient of the end task's dev loss, under a new head at every call.

    A head that is trained along has seen the train split and may know it by heart; one that is fitted, for this step
    alone, to some dev samples makes the gradient speak of the backbone. All samples are drawn anew for every step,
    those of the head and those of the loss apart from each other.
    """

    def __init__(self, parts: Parts, engine: Engine):
        self.engine, self.model, self.config = engine, parts.model, parts.sampler.config
        self.seed, self.rows = parts.recipe.seed, parts.recipe.training.micro_batch_rows
        self.task: EndTask = parts.model.objectives["end_task"]

    def measure(self, step: int) -> Gradient:
        """Return the gradient at ``step``; all ranks call it. Dropout is off."""
        config, samples = self.config, len(self.task.splits["dev"])
        seed = scalar_seed(self.seed, "dev samples", step)
        order = torch.from_numpy(shuffled(np.arange(config.head_samples + config.dev_samples), samples, seed)[0])
        at_once = self.rows * self.engine.world_size
        places = torch.arange(-(-config.dev_samples // at_once) * at_once)
        counted, drawn = places < config.dev_samples, order[config.head_samples :][places % config.dev_samples]
        self.engine.module.eval()
        try:
            self.engine.begin_step()
            judges = {"dev": DevLoss(self.task, self.fit_head(order[: config.head_samples], step))}
            for own in places.view(-1, self.engine.world_size, self.rows)[:, self.engine.rank]:
                view = self._view(drawn[own], counted[own])
                loss, _ = self.engine({"dev": view}, {"dev": 1 / config.dev_samples}, judges=judges)
                self.engine.backward(loss)
            return self.engine.gradient()
        finally:
            self.engine.module.train()

    def fit_head(self, indices: torch.Tensor, step: int) -> TaskHead:
        """Fit a new head to some dev samples, with the backbone as it is; every rank does the same."""
        config, encoder = self.config, self.model.encoder
        view = self._view(indices, torch.ones_like(indices, dtype=torch.bool))
        with torch.no_grad():
            features = self.task.features(encoder, view.drawn).float()
        torch.manual_seed(scalar_seed(self.seed, "dev head", step))
        head = TaskHead(features.shape[1], encoder.config.num_labels, dropout=0.0).to(features.device)
        optimizer = torch.optim.AdamW(
            head.parameters(), config.head_learning_rate, betas=HEAD_BETAS, weight_decay=HEAD_DECAY
        )
        before = None
        for _ in range(config.head_steps):
            loss = self.task.losses(head(features), view.labels).mean()
            if before is not None and abs(before - loss.item()) < SMALLEST_MOVE:
                break
            before = loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return head.requires_grad_(False)

    def _view(self, indices: torch.Tensor, counted: torch.Tensor) -> DevView:
        device = self.engine.device
        return DevView(*self.task.lay_out("dev", indices.to(device)), counted.to(device))
