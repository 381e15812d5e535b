"""The optimizer under ZeRO: AdamW, or Muon with AdamW for the rest, that leaves inactive groups wholly alone.

Under ZeRO a parameter that took no part in a step has a zero gradient, not none, and a plain AdamW would still decay
its weight, apply its momentum and count the step. Here every group carries the component it belongs to, and a step
touches only the groups of the components named active.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.training.flat import Flat, Fragment

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_ITERATIONS = 5


@dataclass(frozen=True)
class OptimizerSettings:
    """What the recipe says of the optimizer; the learning rate comes with every step.

    ``momentum`` is Muon's; ``betas`` and ``eps`` are AdamW's, also for the parameters that Muon leaves to it. Muon's
    update is scaled to AdamW's root mean square, so one learning rate fits both (arXiv 2502.16982, eq. 4).
    """

    name: Literal["adamw", "muon"]
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float = 0.95


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters of one component ("backbone", "head/mlm"), which is active or idle in a step as a whole."""

    name: str
    params: list[nn.Parameter]
    lr_scale: float = 1.0


class ComponentOptimizer(torch.optim.AdamW):
    """AdamW and Muon over the groups whose component is in ``active``; the other groups' weights and states stay.

    Muon (kellerjordan.github.io/posts/muon) needs whole matrices, and ZeRO hands over flat parts of them. ``layout``,
    set once ZeRO has cut the parameters, tells which part of which matrix lies where; the momentum update of a matrix
    is then put together by one all-reduce, orthogonalised on the ranks that hold a part, and each rank takes its own.
    """

    def __init__(self, groups: list[dict], settings: OptimizerSettings):
        super().__init__(
            groups,
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=None if torch.cuda.is_available() else True,  # on a CPU a ninth of the time; on GPUs torch chooses
        )
        self.momentum = settings.momentum
        self.active: frozenset[str] = frozenset()
        self.layout: dict[int, Flat] = {}  # by id of the flat tensor
        self.partitioned = False  # whether ranks hold different parts

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the groups of the active components from their ``.grad``."""
        groups = self.param_groups
        active = [group for group in groups if group["component"] in self.active]
        self.param_groups = [group for group in active if group["algorithm"] == "adamw"]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in active:
            if group["algorithm"] == "muon":
                for master in group["params"]:
                    self._muon_step(self.layout[id(master)], group["lr"], group["weight_decay"])

    def set_learning_rate(self, lr: float) -> None:
        """Set ``lr`` times its own scale on every group."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _muon_step(self, flat: Flat, lr: float, weight_decay: float) -> None:
        """One Muon step on the matrices of one flat tensor."""
        master, state = flat.master, self.state[flat.master]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(master)
        buffer = state["momentum_buffer"]
        buffer.lerp_(master.grad, 1 - self.momentum)
        update = master.grad.lerp(buffer, self.momentum)  # Nesterov
        master.mul_(1 - lr * weight_decay)
        own = {id(fragment.parameter): fragment for fragment in flat.fragments}
        for parameter, shape in zip(flat.parameters, flat.shapes, strict=True):
            fragment = own.get(id(parameter))
            whole = self._whole(update, fragment, shape, parameter.device)
            if fragment is not None:
                direction = orthogonalise(whole).to(master).reshape(-1)
                part = direction.narrow(0, fragment.start, fragment.numel)
                fragment.of(master).add_(part, alpha=-lr * 0.2 * max(shape) ** 0.5)

    def _whole(self, update: Tensor, fragment: Fragment | None, shape: torch.Size, device: torch.device) -> Tensor:
        """Put one matrix of the update together from all ranks' parts: ``shape``, on the device that communicates."""
        if not self.partitioned:
            return fragment.of(update).view(shape)
        whole = torch.zeros(shape, dtype=update.dtype, device=device)
        if fragment is not None:
            whole.view(-1).narrow(0, fragment.start, fragment.numel).copy_(fragment.of(update))
        torch.distributed.all_reduce(whole)
        return whole


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about UVᵀ of the matrix's singular value decomposition, by Newton-Schulz in bf16: ``[rows, columns]``."""
    a, b, c = MUON_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def build_optimizer(
    module: nn.Module, groups: Collection[ParameterGroup], settings: OptimizerSettings
) -> ComponentOptimizer:
    """Return the optimizer over ``groups``, each split by algorithm and by weight decay.

    Vectors and scalars get no weight decay. Under Muon the matrices of the components train with it, except embeddings,
    matrices with as many rows as the largest embedding (vocabulary heads), and all of a ``head/…`` component.

    Raises:
        ValueError: if the groups do not hold every parameter of ``module`` exactly once, or share a name.
    """
    _check_cover(module, groups)
    embeddings = [layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)]
    vocabulary = max((weight.shape[0] for weight in embeddings), default=0)
    embedding_ids = {id(weight) for weight in embeddings}

    def wants_muon(group: ParameterGroup, parameter: nn.Parameter) -> bool:
        if settings.name != "muon" or parameter.ndim != 2 or group.name.startswith("head/"):
            return False
        return id(parameter) not in embedding_ids and parameter.shape[0] != vocabulary

    built = []
    for group in groups:
        parts: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for parameter in group.params:
            algorithm = "muon" if wants_muon(group, parameter) else "adamw"
            parts.setdefault((algorithm, parameter.ndim >= 2), []).append(parameter)
        for (algorithm, decays), parameters in parts.items():
            built.append(
                {
                    "params": parameters,
                    "component": group.name,
                    "algorithm": algorithm,
                    "lr_scale": group.lr_scale,
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
            )
    return ComponentOptimizer(built, settings)


def _check_cover(module: nn.Module, groups: Collection[ParameterGroup]) -> None:
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise ValueError(f"parameter groups share a name: {sorted(names)}")
    given = [id(parameter) for group in groups for parameter in group.params]
    if len(set(given)) < len(given):
        raise ValueError("a parameter is in two groups (or twice in one); tied parameters belong to one group")
    missing = [name for name, parameter in module.named_parameters() if id(parameter) not in set(given)]
    if missing or len(given) != len(list(module.parameters())):
        raise ValueError(f"every parameter of the module must be in exactly one group; in none: {missing}")
