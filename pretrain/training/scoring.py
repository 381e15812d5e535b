"""Measuring the samples of a micro-batch: their targets, their losses, and the norms of their gradients."""

import torch

from pretrain.influence.ghost import GhostNorms
from pretrain.influence.presence import MICROBATCH
from pretrain.objectives import View
from pretrain.training.build import Parts
from pretrain.training.engine import Engine

Columns = dict[str, torch.Tensor]
"""What was measured → ``[S]`` of a micro-batch's samples; by the fields of :class:`pretrain.influence.Measures`."""
Sums = dict[str, torch.Tensor]
"""Term → ``[S]`` sums of losses."""


def ghosts_of(parts: Parts) -> dict[str, GhostNorms]:
    """Return objective → what finds the norms of its samples' gradients, of those that score; each has its own record.

    Raises:
        UserError: if the model lacks K, or its norms cannot be found.
    """
    if parts.weigher.measures != "norms":
        return {}
    config, recipe = parts.weigher.config, parts.recipe
    keys = {"sketch_size": config.sketch_size, "seed": recipe.seed, "impl": recipe.impl}
    keys["longest"] = parts.store.max_length
    return {name: GhostNorms(parts.model, config.layers, config.score, **keys) for name in parts.weigher.scoring}


class Scoring:
    """Runs one objective on one micro-batch and measures its samples; all ranks make the same calls.

    Squared norms are multiplied with a ``factor``, which makes them those of losses on the scale that is wanted.
    """

    def __init__(self, parts: Parts, engine: Engine):
        self.engine, self.objectives = engine, parts.model.objectives
        self.weigher, self.config = parts.weigher, parts.weigher.config
        self.recomputes = parts.recipe.model.activation_checkpointing
        self.ghosts = ghosts_of(parts)
        self.parameters = next((ghost.parameters for ghost in self.ghosts.values()), [])
        """K's."""

    @property
    def defers(self) -> bool:
        """Whether the recipe asks for deferred gradients."""
        return bool(self.ghosts) and self.config.granularity != MICROBATCH and self.config.gradient == "deferred"

    @property
    def why_not_deferred(self) -> str | None:
        """Why there are no deferred gradients here; None if there are."""
        if self.engine.stage == 3:
            return "ZeRO stage 3 takes away the weights that a deferred gradient needs"
        if self.recomputes:
            return "model.activation_checkpointing forgets what a deferred gradient is made of"
        return next((ghost.why_not_deferred for ghost in self.ghosts.values() if ghost.why_not_deferred), None)

    def measure(self, step: int, name: str, view: View, scales: dict[str, float], factor: float) -> Columns:
        """Run forward, and for norms backward as well, which adds to the accumulated gradient."""
        if not self.ghosts:
            with torch.no_grad():
                _, sums = self.engine({name: view}, scales)
            return self._columns(name, view, sums)
        ghost = self.ghosts[name]
        with ghost.recording(view.batch, deferred=False, step=step):
            loss, sums = self.engine({name: view}, scales)
            self.engine.backward(loss)
        squares = ghost.squared_norms() / self.engine.world_size**2  # with which the engine multiplies the loss
        return self._columns(name, view, sums) | {"squares": factor * squares}

    def record(self, step: int, name: str, view: View, scales: dict[str, float], factor: float) -> tuple[Sums, Columns]:
        """Run forward and backward without a gradient, for :meth:`weighed` to make one of what they leave."""
        ghost = self.ghosts[name]
        with ghost.recording(view.batch, deferred=True, step=step):
            loss, sums = self.engine.run_apart({name: view}, scales)
            torch.autograd.backward(loss)
        return sums, self._columns(name, view, sums) | {"squares": factor * ghost.squared_norms()}

    def weighed(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return a loss of 0 whose gradient is that of the recorded losses with ``weights`` (objective → ``[S]``)."""
        return sum(self.ghosts[name].injected(each) for name, each in weights.items())

    def _columns(self, name: str, view: View, sums: Sums) -> Columns:
        terms = self.objectives[name].terms
        losses = (weight * sums[term] / view.counts[term].clamp(min=1) for term, weight in terms.items())
        return {"targets": sum(view.counts[term] for term in terms), "losses": sum(losses)}
