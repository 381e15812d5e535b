"""What a run really keeps and sends: bytes of all tensors there are, and every collective that torch dispatches."""

import gc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.planning.live import LiveTensors
from pretrain.training.ds_config import resolve_ds_config
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup

CONFIGS = Path(__file__).parents[2] / "configs" / "ds"
WIDTH, VOCABULARY, MICRO_STEPS = 96, 203, 2
_KINDS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_": "reduce-scatter",
}
_SCALARS = 16  # elements; norms, flags and what else ranks agree on


class Model(nn.Module):
    """An embedding, layers and a head; its two components are ``trunk`` and ``head``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Embedding(VOCABULARY, WIDTH),
            *(nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)) for _ in range(3)),
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(tokens)).float().square().sum()

    def groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(name, list(getattr(self, name).parameters())) for name in ("trunk", "head")]


class Collectives(TorchDispatchMode):
    """Adds up the bytes of whole tensors, by kind of collective, while it is entered; scalars are left out."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and "barrier" not in function._schema.name:
            name = function._schema.name
            kind = _KINDS.get(name, name)
            whole = list(_tensors(args[1] if kind == "reduce-scatter" else args[0]))  # what is cut, or what is made
            if sum(each.numel() for each in whole) > _SCALARS:
                self.bytes[kind] += sum(each.nbytes for each in whole)
        return function(*args, **(kwargs or {}))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


@dataclass(frozen=True)
class Step:
    """What one rank held and sent in a step, in bytes."""

    held: int
    """Between its calls, the most from the last backward on."""
    micro_step: int
    """Within its micro-steps, at the most."""
    update: int
    """Within the update, at the most."""
    sent: dict[str, int]
    """Of all collectives, by kind."""


def configuration(name: str) -> dict:
    """A shipped configuration with buckets that fit this model: of more than its largest matrix, less than all."""
    config = resolve_ds_config(
        CONFIGS / f"{name}.json",
        micro_batch_rows=1,
        batch_rows=2 * MICRO_STEPS,
        world_size=2,
        gradient_clipping=1.0,
        device_type="cpu",
    )
    zero = config["zero_optimization"]
    zero |= {key: 40000 for key in ("reduce_bucket_size", "allgather_bucket_size") if key in zero}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 5000}
    return config


def measure_step(name: str, optimizer: str, changes: dict) -> Step:
    """Train some steps on this rank; return the least that one takes, but for the first: stage 3 knows the order of the
    weights then, and what waits to be collected as garbage differs from step to step."""
    from pretrain.training.engine import Engine, init_distributed

    init_distributed(60)
    config = configuration(name)
    config["zero_optimization"] |= changes
    with LiveTensors() as live:
        module = Model()
        engine = Engine(module, module.groups(), config, OptimizerSettings(optimizer, 0.01, (0.9, 0.98), 1e-6))
        steps = []
        for _ in range(4):
            gc.collect()
            live.most()
            with Collectives() as collectives:
                engine.begin_step()
                for micro_step in range(MICRO_STEPS):
                    engine.backward(engine(torch.arange(7 + micro_step)[None]))
                gc.collect()
                micro_steps, held = live.most(), live.now()
                engine.step(1e-3, {"trunk", "head"})
            gc.collect()
            steps.append((max(held, live.now()), micro_steps, live.most()))
    engine.close()
    held, micro_step, update = (min(each) for each in zip(*steps[1:], strict=True))
    return Step(held, micro_step, update, dict(collectives.bytes))
