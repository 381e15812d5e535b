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
    """Raise :class:`UserError` if a step has no micro-batches to be told apart, or if they are single samples."""
    training, halves = parts.recipe.training, parts.weigher.config.halves
    steps = training.batch_rows // (training.micro_batch_rows * world_size)
    if steps < 2 * halves or steps % halves:
        needs = "four micro-steps, or six, eight, …," if halves == 2 else "two micro-steps or more"
        raise UserError(
            f"weigher.granularity: weighing micro-batches needs {needs} a step, not {steps} ({training.batch_rows} "
            f"rows over {world_size} ranks × {training.micro_batch_rows} rows); lower training.micro_batch_rows"
        )
    if lone_samples(parts, world_size) == 1:
        raise UserError(
            "weigher.granularity: each micro-batch is a single sample; set it to sample, or raise "
            "training.micro_batch_rows"
        )


def lone_samples(parts: Parts, world_size: int) -> float:
    """Return the share of the samples that are a micro-batch by themselves, since no other fits beside them."""
    if parts.recipe.training.micro_batch_rows * world_size * parts.weigher.config.halves > 1:
        return 0.0
    if not parts.recipe.data.packing:
        return 1.0
    lengths = np.asarray(parts.store.lengths)
    return float((lengths + lengths.min() > parts.row_length).mean())


def weigh_micro_batches(
    weighing: "Weighing", trainer: "Trainer", views: list[dict[str, View]], scales: dict[str, float]
) -> tuple[dict[str, torch.Tensor], dict[str, Measures], dict[str, np.ndarray]]:
    """Accumulate Σ w_j · g_j over the step's micro-steps j; return this rank's sums of losses and, under the name
    ``microbatch``, what was measured of the micro-batches and their weights.

    A micro-batch is a micro-step of all ranks; with ``signal: split`` it is two, its halves. Deferred, the gradients of
    all micro-steps are kept, and their memory for the next step: 4 bytes a parameter and micro-step, divided by the
    world size. In two passes they are forgotten once they are measured, and the second is an ordinary one with weights.
    """
    engine, weigher = weighing.engine, weighing.weigher
    halves = weigher.config.halves
    in_two_passes = weigher.config.gradient == "two_pass"
    noise = _Noise() if weigher.switch and weigher.switch.is_due(trainer.step) else None
    gradients: list[Gradient] = []
    products: list[torch.Tensor] = []
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

        scoring = [engine.restrict(each, weighing.scoring.parameters) for each in gradients[-halves:]]
        if noise:
            noise.add(scoring[-1])
        if (number + 1) % halves == 0:
            products.append(scoring[0].dot(scoring[-1]))
            if in_two_passes:
                weighing.memory, gradients = gradients, []

    if noise:
        square, *squares = engine.all_reduce(torch.stack([noise.whole.dot(noise.whole), *noise.squares])).tolist()
        weigher.switch.take(square, np.array(squares))
    targets, losses = engine.all_reduce(own).numpy().reshape(2, -1, halves).sum(2)
    measures = Measures(targets, losses * len(products), engine.all_reduce(torch.stack(products)).numpy())
    weights = weigher.weights(trainer.step, MICROBATCH, measures, len(products))
    factors = weights.repeat(halves).tolist()
    if in_two_passes:
        engine.begin_step()
        own_weights = [_of_samples(each, factor) for each, factor in zip(views, factors, strict=True)]
        sums = trainer.accumulate(views, scales, own_weights)
    else:
        engine.put_gradient(Gradient.combine(gradients, factors, in_place=True))
        weighing.memory = gradients
    return sums, {MICROBATCH: measures}, {MICROBATCH: weights}


class _Noise:
    """The gradient of a step over K, and the squared norms of its micro-steps' parts in it, on this rank."""

    def __init__(self):
        self.whole: Gradient | None = None
        self.squares: list[torch.Tensor] = []

    def add(self, part: Gradient) -> None:
        self.squares.append(part.dot(part))
        terms = [part] if self.whole is None else [self.whole, part]
        self.whole = Gradient.combine(terms, [1.0] * len(terms), in_place=len(terms) > 1)


def _of_samples(views: dict[str, View], weight: float) -> dict[str, torch.Tensor]:
    """Return objective → the weight ``[S]`` of all samples of a micro-step."""
    return {name: torch.full_like(view.batch.lengths, weight, dtype=torch.float32) for name, view in views.items()}
