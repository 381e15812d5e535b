"""What samplers wish to know of the model, measured on held-out rows between two steps, which it does not change."""

from collections.abc import Sequence

import torch

from pretrain.data.batch import Batch
from pretrain.sampling import Measured, Wish
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.gradient import Gradient
from pretrain.training.heldout import heldout_losses, judged


class SamplerProbe:
    """Measures what :class:`pretrain.sampling.Wish` names; all ranks call it. Nothing of it stays in the next step."""

    def __init__(self, parts: Parts, engine: Engine):
        self.engine, self.objectives = engine, parts.model.objectives
        self.batch_rows = parts.recipe.training.batch_rows
        self._loader = parts.probe_loader(rank=engine.rank, world_size=engine.world_size)
        self._micro_batches = self._loader.next().micro_batches if self._loader else []

    def measure(self, wish: Wish) -> Measured:
        """Return what is wished for."""
        rows = self._micro_batches if wish is Wish.LOSSES else self._loader.next().micro_batches
        losses = heldout_losses(self.engine, self.objectives, rows)
        if wish in (Wish.LOSSES, Wish.FRESH_LOSSES):
            return Measured(losses=losses)
        middle = len(rows) // 2
        halves = rows[:middle], rows[middle:]
        return self._noise(losses, *halves) if wish is Wish.NOISE else self._credits(losses, *halves)

    def _credits(self, losses: dict[str, float], one: Sequence[Batch], other: Sequence[Batch]) -> Measured:
        """Compare the gradient of all relative losses on one half of the rows with each objective's on the other, so
        that an objective's own noise does not speak for it."""
        direction = self.gradient({name: 1 / max(abs(loss), 1e-8) for name, loss in losses.items()}, one)
        products, squares, square = {}, {}, 0.0
        for name in self.objectives:
            own = self.gradient({name: 1.0}, other)
            pairs = [(direction, own), (own, own), (direction, direction)]
            products[name], squares[name], square = self.engine.inner_products(pairs)
        return Measured(losses=losses, products=products, squares=squares, direction_square=square)

    def _noise(self, losses: dict[str, float], one: Sequence[Batch], other: Sequence[Batch]) -> Measured:
        """Estimate ‖∇L‖² by the product of two halves' gradients, and a training batch's variance by their
        difference."""
        squares, noise = {}, {}
        rows = len(one) * self.engine.world_size * one[0].tokens.shape[0]
        for name in self.objectives:
            halves = [self.gradient({name: 1.0}, half) for half in (one, other)]
            pairs = [(halves[0], halves[1]), (halves[0], halves[0]), (halves[1], halves[1])]
            squares[name], first, second = self.engine.inner_products(pairs)
            of_a_half = (first + second - 2 * squares[name]) / 2
            noise[name] = of_a_half * rows / self.batch_rows
        return Measured(losses=losses, squares=squares, noise=noise)

    def gradient(self, shares: dict[str, float], micro_batches: Sequence[Batch]) -> Gradient:
        """Return the gradient of Σ share · mean loss over micro-batches of all ranks."""
        self.engine.begin_step()
        for name, share in shares.items():
            objective = self.objectives[name]
            views = [objective.heldout_view(batch.to(self.engine.device)) for batch in micro_batches]
            own = [[view.counts[term].sum() for term in objective.terms] for view in views]
            counts = self.engine.all_reduce(torch.tensor(own, dtype=torch.float64).sum(0)).clamp(min=1).tolist()
            terms = zip(objective.terms.items(), counts, strict=True)
            scales = {term: share * weight / count for (term, weight), count in terms}
            for view in judged(self.engine, objective, micro_batches):
                loss, _ = self.engine({name: view}, scales)
                self.engine.backward(loss)
        gradient = self.engine.gradient()
        self.engine.begin_step()
        return gradient

    def state_dict(self) -> dict:
        """Return where the rows that are new each time have got to."""
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state: dict) -> None:
        """Take up :meth:`state_dict`."""
        if self._loader:
            self._loader.load_state_dict(state)
