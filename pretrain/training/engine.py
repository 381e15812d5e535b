"""The engine: forward, backward and update of one module on all ranks, with DeepSpeed ZeRO underneath.

Its promise is that a step is that of plain torch on one process over the sum of all ranks' losses, at every stage it
accepts. DeepSpeed's ways to break it, and how each is avoided, are in docs/deepspeed.md.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.training import ds_internals
from pretrain.training.beats import Progress
from pretrain.training.gradient import Gradient
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup, build_optimizer
from pretrain.training.process_group import init_distributed, shutdown_distributed
from pretrain.training.states import consolidate, load_states, save_states

__all__ = ["Engine", "StepOutcome", "init_distributed", "shutdown_distributed"]

_REDUCTIONS = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}


@dataclass(frozen=True)
class StepOutcome:
    """What a step did: the global 2-norm before clipping (inf if not finite), and whether the weights were updated."""

    grad_norm: float
    applied: bool


class Engine:
    """One module, its optimizer and its gradients, spread over the ranks as the DeepSpeed configuration says.

    A step is ``begin_step()``, then for each micro-step one call of the engine and one ``backward``, then ``step`` or
    ``skip_step``; all ranks make the same calls in the same order, with the same objectives.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Collection[ParameterGroup],
        ds_config: dict,
        settings: OptimizerSettings,
        progress: Progress | None = None,
    ):
        """Wrap ``module``; ``ds_config`` comes from ``resolve_ds_config``, the process group from ``init_distributed``.

        Args:
            progress: is told of every call, for a :class:`~pretrain.training.watch.Watch`.

        Raises:
            ValueError: if ``groups`` do not hold every parameter of ``module`` exactly once.
        """
        self.progress = progress or Progress()
        self._optimizer = build_optimizer(module, groups, settings)
        self._components = frozenset(group.name for group in groups)
        self._clip = ds_config["gradient_clipping"]
        given = {id(each): each.detach().to("cpu", torch.float32, copy=True) for each in module.parameters()}
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=self._optimizer, config=ds_config)
        self._flats = ds_internals.flats(self._engine)
        component_of = {id(parameter): group.name for group in groups for parameter in group.params}
        self._flat_components = [component_of[id(flat.parameters[0])] for flat in self._flats]
        if self.dtype != torch.float32:
            self._fill_masters(given)
        self._optimizer.layout = {id(flat.master): flat for flat in self._flats}
        self._optimizer.partitioned = self.stage > 0
        self._forwards = self._backwards = 0

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return int(self._engine.zero_optimization_stage())

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights: bfloat16 or float32."""
        return torch.bfloat16 if self._engine.bfloat16_enabled() else torch.float32

    @property
    def module(self) -> nn.Module:
        """The module itself; its weights are empty between uses at stage 3, so call the engine to run it."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. Its outputs are tensors, or tuples, lists and dicts of them."""
        self.progress.call()
        if torch.is_grad_enabled():
            self._forwards += 1
        return self._engine(*args, **kwargs)

    def run_apart(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as a call of the engine does, for a ``torch.autograd.backward`` of which DeepSpeed shall know
        nothing: one that gives no parameter a gradient. Stages 0 to 2; the weights of stage 3 are in pieces.

        It counts as a call: another loss may take the place of its outputs in ``backward``.
        """
        self._forwards += 1
        return self._engine.module(*args, **kwargs)

    def begin_step(self) -> None:
        """Forget every gradient there is; the first call of a step."""
        self.progress.begin_step()
        ds_internals.forget_gradients(self._engine)
        self._forwards = self._backwards = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this rank's part of a sum over all ranks and all ``backward`` calls of a step.

        Nothing divides it: not by the world size, not by the number of micro-steps.

        Raises:
            RuntimeError: if the engine was not called since the last ``backward``; several forwards may share one
                backward of their summed losses, but not the other way round, which ZeRO-3 gets wrong in silence.
        """
        if self._forwards == 0:
            raise RuntimeError("backward() without a call of the engine since the last one; sum the losses instead")
        self.progress.call()
        # ZeRO averages over ranks; the product is also a new tensor, which DeepSpeed's output hooks do not rescale.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        self._forwards, self._backwards = 0, self._backwards + 1

    def step(self, lr: float, active: Collection[str]) -> StepOutcome:
        """Clip by the global norm and update the components named in ``active``, with ``lr`` times each group's scale.

        The other components' weights, momenta and step counters stay as they are; they must have had no gradient. If
        any rank's gradient is not finite, nothing is updated on any rank.

        Raises:
            ValueError: if ``active`` names a component there is not.
            RuntimeError: if there was no ``backward`` in this step.
        """
        self._check_components(active)
        if self._backwards == 0:
            raise RuntimeError("step() without backward(); use skip_step()")
        self._optimizer.active = frozenset(active)
        self._optimizer.set_learning_rate(lr)
        outcome = self._step_replicated() if self.stage == 0 else self._step_partitioned()
        self._backwards = 0
        self.progress.end_step()
        return outcome

    def skip_step(self) -> None:
        """Drop the step's gradients without an update; the next step is as if this one had never been."""
        self.begin_step()

    def gradient(self, into: Gradient | None = None) -> Gradient:
        """Return a copy of this rank's part of what the ``backward`` calls since ``begin_step`` add up to.

        All ranks call it. The accumulated gradient stays as it is: ``step``, another ``backward`` or ``begin_step`` may
        follow. It takes 4 bytes a parameter, divided by the world size.

        Args:
            into: a gradient that is needed no longer, whose memory is taken.

        Raises:
            RuntimeError: if there was no ``backward`` in this step.
        """
        if self._backwards == 0:
            raise RuntimeError("gradient() without backward()")
        parts: dict[str, list[Tensor]] = {}
        memory = None if into is None else self._flat_parts(into)
        for component, part in zip(
            self._flat_components, ds_internals.read_gradient(self._engine, memory), strict=True
        ):
            parts.setdefault(component, []).append(part)
        return Gradient(parts)

    def restrict(self, gradient: Gradient, parameters: Collection[nn.Parameter]) -> Gradient:
        """Return what a gradient holds of some of the module's parameters; views of its shards, no copies."""
        wanted = {id(parameter) for parameter in parameters}
        shards = {component: iter(each) for component, each in gradient.parts.items()}
        parts: dict[str, list[Tensor]] = {component: [] for component in gradient.parts}
        for component, flat in zip(self._flat_components, ds_internals.shards(self._engine), strict=True):
            shard = next(shards[component])
            parts[component] += [each.of(shard) for each in flat.fragments if id(each.parameter) in wanted]
        return Gradient(parts)

    def put_gradient(self, gradient: Gradient) -> None:
        """Replace the accumulated gradient by ``gradient``, so that ``step`` applies it and ``backward`` adds to it.

        All ranks call it. What it has of components that ``step`` leaves out counts in the norm and goes nowhere else.
        """
        ds_internals.write_gradient(self._engine, self._flat_parts(gradient))
        self._forwards, self._backwards = 0, 1

    def _flat_parts(self, gradient: Gradient) -> list[Tensor]:
        """Return a gradient's shards in the order of DeepSpeed's flat tensors."""
        parts = {component: iter(shards) for component, shards in gradient.parts.items()}
        return [next(parts[component]) for component in self._flat_components]

    def inner_products(
        self, pairs: Sequence[tuple[Gradient, Gradient]], components: Collection[str] | None = None
    ) -> list[float]:
        """Return the inner product of each pair, over ``components`` if they are named; the same bits on all ranks.

        All ranks call it. Products and sums are in fp64, and one reduction serves all pairs.

        Raises:
            ValueError: if ``components`` names a component there is not.
        """
        self._check_components(components or ())
        if not pairs:
            return []
        return self.all_reduce(torch.stack([left.dot(right, components) for left, right in pairs])).tolist()

    def all_reduce(self, values: list[float] | Tensor, op: str = "sum") -> Tensor:
        """Reduce a few numbers over ranks by ``op``, "sum" or "max"; float64, of the same shape, on the CPU."""
        self.progress.call()
        numbers = torch.as_tensor(values, dtype=torch.float64).to(self.device, copy=True)
        torch.distributed.all_reduce(numbers, _REDUCTIONS[op])
        return numbers.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank has as ``value``, something small, in the order of ranks; all ranks call it."""
        self.progress.call()
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.progress.call()
        torch.distributed.barrier()

    def save(self, folder: Path) -> Path | None:
        """Write weights, optimizer states and buffers into ``folder``, which all ranks share; all ranks call it.

        Returns, when every rank has written, the file that this one has, if it has any. Writes no pointer and no
        manifest.
        """
        self.progress.expect_long()
        written = save_states(Path(folder), self.rank, self.module, self._flats, self._optimizer.state, self.stage == 0)
        self.barrier()
        return written

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote: the same bits on the same world size and stage, the same numbers on any other.

        Raises:
            UserError: if the folder is not such a checkpoint, is damaged, or is of another model.
        """
        self.progress.expect_long()
        load_states(Path(folder), self.module, self._flats, self._optimizer.state)
        ds_internals.publish(self._engine)
        self.begin_step()
        self.barrier()

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Return all weights (fp32 masters) and buffers on rank 0's CPU, None on other ranks; all ranks call it.

        Tied parameters appear under all their names and share one tensor.
        """
        return consolidate(self.module, self._flats, self.rank, self.stage == 0)

    def close(self) -> None:
        """Free the engine's memory and leave the process group; the engine cannot be used after."""
        self._engine.destroy()
        self._flats.clear()
        self._optimizer.layout.clear()
        self._optimizer.state.clear()
        del self._engine
        shutdown_distributed()

    def _check_components(self, names: Collection[str]) -> None:
        if unknown := set(names) - self._components:
            raise ValueError(f"unknown components {sorted(unknown)}; the engine has {sorted(self._components)}")

    def _fill_masters(self, given: dict[int, Tensor]) -> None:
        """Give the fp32 masters rank 0's weights as ``given``; DeepSpeed fills them with what bf16 leaves of them."""
        for flat in self._flats:
            own = {id(fragment.parameter): fragment for fragment in flat.fragments}
            for parameter in flat.parameters:
                whole = given.pop(id(parameter)).to(self.device).view(-1)
                torch.distributed.broadcast(whole, 0)
                if (fragment := own.get(id(parameter))) is not None:
                    fragment.of(flat.master).copy_(whole.narrow(0, fragment.start, fragment.numel))

    def _step_partitioned(self) -> StepOutcome:
        self._engine.step()
        return StepOutcome(ds_internals.gradient_norm(self._engine), self._engine.was_step_applied())

    def _step_replicated(self) -> StepOutcome:
        """Stage 0: DeepSpeed would neither report the norm nor notice a NaN."""
        ds_internals.reduce_replicated_gradients(self._engine)
        gradients = [flat.master.grad for flat in self._flats]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            return StepOutcome(math.inf, False)
        if self._clip > 0:
            torch._foreach_mul_(gradients, min(1.0, self._clip / (norm + 1e-6)))
        self._optimizer.step()
        return StepOutcome(norm, True)
