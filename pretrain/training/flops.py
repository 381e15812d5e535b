"""Model FLOPs: what each objective's forward and backward must compute, for the utilisation of the device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.log import peak_flops


class FlopCounter:
    """Counts each objective's matrix-product FLOPs on one micro-batch, once; idle if the device's peak is not known.

    A backward pass counts as two forwards; recomputed activations and optimizer arithmetic do not count (the model
    FLOPs of arXiv 2204.02311, appendix B). Attention in flash kernels is left out by the counter, so the utilisation
    of long samples is understated.
    """

    def __init__(self, parts: Parts, engine: Engine):
        self.parts, self.engine = parts, engine
        peak = (parts.recipe.log.peak_tflops or 0.0) * 1e12
        if not peak and engine.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name()) or 0.0
        self.peak = float(engine.all_reduce([peak], "max")) or None  # all ranks count, or none
        self._flops_per_token: dict[str, float] = {}

    def utilisation(self, plan: dict[str, float], tokens: int, seconds: float) -> float | None:
        """Return the fraction of all devices' peak that a step reached, or None."""
        if self.peak is None:
            return None
        flops = sum(self._per_token(name) for name in plan) * tokens
        return flops / seconds / (self.peak * self.engine.world_size)

    @torch.no_grad()
    def _per_token(self, name: str) -> float:
        if name not in self._flops_per_token:
            # All ranks come here in the same step, as they have the same plan: ZeRO-3 gathers weights for it.
            batch = self.parts.loader(rank=self.engine.rank, world_size=self.engine.world_size).next().micro_batches[0]
            objective = self.parts.model.objectives[name]
            view = objective.corrupt(batch.to(self.engine.device), progress=0.0)
            with FlopCounterMode(display=False) as counter:
                self.engine({name: view}, dict.fromkeys(objective.terms, 0.0))
            self._flops_per_token[name] = 3 * counter.get_total_flops() / int(batch.lengths.sum())
        return self._flops_per_token[name]
