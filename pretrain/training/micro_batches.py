"""Weighing whole micro-batches, as the paper does (PRESENCE, arXiv 2311.00913, algorithm 2)."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.influence import Measures
from pretrain.influence.presence import MICROBATCH
from pretrain.objectives import View
from pretrain.training.build import Parts
from pretrain.training.gradient import Gradient
from pretrain.training.record import add_sums

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer
    from pretrain.training.weighing import Weighing


def check_micro_batches(parts: Parts, world_size: int) -> None:
    """Raise :class:`UserError` if a step has no micro-batches to be told apart."""
    training, split = parts.recipe.training, parts.weigher.config.signal == "split"
    steps = training.batch_rows // (training.micro_batch_rows * world_size)
    if steps < (4 if split else 2) or (split and steps % 2):
        needs = "four micro-steps, or six, eight, …," if split else "two micro-steps or more"
        raise UserError(
            f"weigher.granularity: weighing micro-batches needs {needs} a step, not {steps} ({training.batch_rows} "
            f"rows over {world_size} ranks × {training.micro_batch_rows} rows); lower training.micro_batch_rows"
        )
    if training.micro_batch_rows * world_size == 1 and not parts.recipe.data.packing:
        raise UserError(
            "weigher.granularity: each micro-batch is a single sample; set it to sample, or raise "
            "training.micro_batch_rows"
        )


def weigh_micro_batches(
    weighing: "Weighing", trainer: "Trainer", views: list[dict[str, View]], scales: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, Measures], dict[str, np.ndarray]]:
    """Accumulate Σ w_j · g_j over the step's micro-steps j; return this rank's sums of losses and, under the name
    ``microbatch``, what was measured of the micro-batches and their weights.

    A micro-batch is a micro-step of all ranks; with ``signal: split`` it is two, its halves. The gradients of all of
    them are kept, and their memory for the next step: 4 bytes a parameter and micro-step, divided by the world size.
    """
    engine, weigher = weighing.engine, weighing.weigher
    gradients: list[Gradient] = []
    sums = dict.fromkeys(scales, torch.zeros((), device=engine.device))
    own = torch.zeros(2, len(views), dtype=torch.float64, device=engine.device)  # targets and losses
    for number, micro_views in enumerate(views):
        engine.begin_step()
        trainer.seed_dropout(number)
        loss, of_samples = engine(micro_views, scales)
        engine.backward(loss)
        gradients.append(engine.gradient(into=weighing.memory.pop() if weighing.memory else None))
        add_sums(sums, of_samples)
        own[1, number] = sum(scale * of_samples[term].sum() for term, scale in scales.items())
        own[0, number] = sum(counts.sum() for view in micro_views.values() for counts in view.counts.values())

    halves = 2 if weigher.config.signal == "split" else 1
    parts = [engine.restrict(gradient, weighing.scoring.parameters) for gradient in gradients]
    pairs = list(zip(parts[::halves], parts[halves - 1 :: halves], strict=True))
    if weigher.switch and weigher.switch.is_due(trainer.step):
        whole = Gradient.combine(parts, [1.0] * len(parts))
        square, *squares = engine.inner_products([(whole, whole), *((part, part) for part in parts)])
        weigher.switch.take(square, np.array(squares))
    targets, losses = engine.all_reduce(own).numpy().reshape(2, -1, halves).sum(2)
    measures = Measures(targets, losses * len(pairs), np.array(engine.inner_products(pairs)))
    weights = weigher.weights(trainer.step, MICROBATCH, measures, len(pairs))
    engine.put_gradient(Gradient.combine(gradients, weights.repeat(halves).tolist(), in_place=True))
    weighing.memory = gradients
    return sums, {MICROBATCH: measures}, {MICROBATCH: weights}
