"""Model FLOPs: what forward and backward of objectives must compute, for the utilisation of the device."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from pretrain.data.batch import Batch
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.training.build import Parts
from pretrain.training.engine import Engine
from pretrain.training.log import peak_flops

_TRAINED = 3  # a product's factors have a gradient each, and each takes a product more


def flops_per_token(
    model: MultiObjectiveModel, batch: Batch, names: Collection[str], run: Callable[..., Any] | None = None
) -> float:
    """Return the matrix-product FLOPs of one forward and backward of objectives together, a real token of the batch.

    Only the forward pass is done, without a gradient: what it computes where gradients are on counts three times, what
    it computes without them once. Recomputed activations and the optimizer's arithmetic do not count (the model FLOPs
    of arXiv 2204.02311, appendix B); attention counts all pairs of its blocks.

    Args:
        model: on the device of ``batch``.
        names: of the objectives; what one of them takes over from another is computed, and counted, once.
        run: what runs the model; None: itself.
    """
    objectives = {name: model.objectives[name] for name in names}
    with torch.no_grad():
        views = {name: objective.corrupt(batch, progress=0.0) for name, objective in objectives.items()}
    scales = {term: 0.0 for objective in objectives.values() for term in objective.terms}
    with torch.enable_grad(), _without_gradients(model), _plain_linear(), _ForwardFlops() as counter:
        (run or model)(views, scales)
    return counter.flops / int(batch.lengths.sum())


def expected_flops_per_token(
    model: MultiObjectiveModel, batch: Batch, shares: Mapping[str, float], *, mixes: bool
) -> float:
    """Return :func:`flops_per_token` of a step in expectation: of all objectives that have a share, or, if the sampler
    does not mix them but draws one a step, the mean over the draws."""
    planned = {name: share for name, share in shares.items() if share > 0}
    if mixes:
        return flops_per_token(model, batch, planned)
    total = sum(planned.values())
    return sum(share / total * flops_per_token(model, batch, [name]) for name, share in planned.items())


class FlopCounter:
    """Counts the FLOPs of what is planned on one micro-batch, once a plan; idle if the device's peak is not known."""

    def __init__(self, parts: Parts, engine: Engine):
        self.parts, self.engine = parts, engine
        peak = (parts.recipe.log.peak_tflops or 0.0) * 1e12
        if not peak and engine.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name()) or 0.0
        self.peak = float(engine.all_reduce([peak], "max")) or None  # all ranks count, or none
        self._per_token: dict[frozenset[str], float] = {}

    def utilisation(self, plan: Mapping[str, float], tokens: int, seconds: float) -> float | None:
        """Return the fraction of all devices' peak that a step reached, or None."""
        if self.peak is None:
            return None
        return self.per_token(plan) * tokens / seconds / (self.peak * self.engine.world_size)

    def per_token(self, names: Collection[str]) -> float:
        """Return :func:`flops_per_token` on the run's first micro-batch."""
        key = frozenset(names)
        if key not in self._per_token:
            # All ranks come here in the same step, as they have the same plan: ZeRO-3 gathers weights for it.
            batch = self.parts.loader(rank=self.engine.rank, world_size=self.engine.world_size).next().micro_batches[0]
            batch = batch.to(self.engine.device)
            self._per_token[key] = flops_per_token(self.parts.model, batch, list(names), self.engine)
        return self._per_token[key]


class _ForwardFlops(TorchDispatchMode):
    """Adds up the FLOPs of products, three times where gradients are on."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        formula = flop_registry.get(function._overloadpacket) or _ATTENTION.get(function._schema.name)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output) * (_TRAINED if torch.is_grad_enabled() else 1)
        return output


@contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Let nothing ask for a gradient, though gradients are on where they are in training: so nothing is kept for a
    backward pass, nor DeepSpeed prepared for one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for parameter in trained:
        parameter.requires_grad_(False)
    # transformers has embeddings ask for one where activations are recomputed.
    hooks = [module.register_forward_hook(lambda module, inputs, output: output.detach()) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _plain_linear() -> Iterator[None]:
    """Have torch's own ``linear`` in its place: at stage 3 DeepSpeed puts an autograd function there, within which
    gradients are off, as if nothing were trained."""
    replaced, functional.linear = functional.linear, torch._C._nn.linear
    try:
        yield
    finally:
        functional.linear = replaced


def _packed_flops(query: torch.Tensor, key, value: torch.Tensor, cu_seqlens: torch.Tensor, *_, **__) -> int:
    """Return the FLOPs of attention within samples: ``query`` and ``value [tokens, heads, size]``."""
    pairs = int(cu_seqlens.diff().long().square().sum())
    return 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


# The kernels of attention for which torch has no formula.
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": sdpa_flop,
    "torch_attn::_varlen_attn": _packed_flops,
}
