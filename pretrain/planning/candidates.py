"""DeepSpeed configurations set against a GPU's memory: with each, the largest micro-batch that fits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError
from pretrain.planning.activations import Activations
from pretrain.planning.communication import sent_per_step
from pretrain.planning.memory import ModelStates, deepspeed_estimate, model_states
from pretrain.planning.zero import Group, Zero


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run, all alike; memory in bytes that a run may use of one."""

    gpus: int
    gpus_per_node: int
    memory: float

    @property
    def local(self) -> int:
        """GPUs on one node."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return self.gpus // self.local


@dataclass(frozen=True)
class Candidate:
    """One DeepSpeed configuration, with the largest micro-batch that fits, or the smallest if none does."""

    path: Path
    zero: Zero
    states: ModelStates
    activations: int
    """Bytes."""
    micro_batch_rows: int
    accumulation: int
    sent: float
    """Bytes that a GPU sends in a step."""
    deepspeed: int | None
    """Bytes of model states on a GPU by DeepSpeed's estimator."""
    fits: bool

    @property
    def total(self) -> int:
        """Bytes on one GPU, at the most."""
        return self.states.peak(self.activations)

    @property
    def preference(self) -> tuple:
        """Orders by what is better: states on the GPU, bf16, little to send, little memory."""
        return self.zero.offload, not self.zero.bf16, self.sent, self.total


def micro_batches(rows: int, unit: int) -> list[int]:
    """Return the rows a micro-batch can have of the ``rows`` a GPU has in a step, in multiples of ``unit``, ascending.

    Raises:
        UserError: if there is none.
    """
    found = [size for size in range(unit, rows + 1, unit) if rows % size == 0]
    if not found:
        raise UserError(
            f"training.batch_rows: leaves {rows} rows to a GPU, but the objectives need {unit} together in a "
            f"micro-batch (group_rows); use a multiple of {unit} × GPUs"
        )
    return found


def candidate(
    path: Path,
    zero: Zero,
    groups: Collection[Group],
    kept: Collection[Activations],
    sizes: Sequence[int],
    machine: Machine,
) -> Candidate:
    """Return what becomes of a configuration.

    Args:
        groups: of the optimizer.
        kept: of each plan of the sampler.
        sizes: rows a micro-batch can have, ascending; the last is all rows of a GPU.
    """
    states = model_states(groups, zero, machine.gpus)

    def activations(rows: int) -> int:
        return int(max(each.at(rows) for each in kept))

    fitting = [rows for rows in sizes if states.peak(activations(rows)) <= machine.memory]
    rows = max(fitting, default=sizes[0])
    return Candidate(
        path=path,
        zero=zero,
        states=states,
        activations=activations(rows),
        micro_batch_rows=rows,
        accumulation=sizes[-1] // rows,
        sent=sent_per_step(groups, zero, sizes[-1] // rows, machine.gpus),
        deepspeed=deepspeed_estimate(groups, zero, machine.local, machine.nodes),
        fits=bool(fitting),
    )
