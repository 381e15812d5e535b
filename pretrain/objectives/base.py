"""The protocol behind which every objective stands, and the registry.

To add an objective: copy the shortest file here, give the class a ``name`` and a ``Config``, register it with
``@register``, and import the file in ``__init__.py``. The test over the registry then covers it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import nn

from pretrain.config import Config, parse
from pretrain.data.batch import Batch
from pretrain.errors import UserError, unknown
from pretrain.model.encoder import Encoder
from pretrain.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pretrain.model.multi_objective import MultiObjectiveModel


@dataclass(frozen=True)
class View:
    """A batch as one objective wants to see it."""

    batch: Batch
    tokens: torch.Tensor
    """``[rows, length]`` int64, corrupted."""
    counts: dict[str, torch.Tensor]
    """Term → ``[S]`` int64: targets of each sample, known before the forward pass."""
    tallies: dict[str, torch.Tensor]
    """What else is worth counting → ``[]`` int64; added up over the global batch and logged."""


@dataclass(frozen=True)
class LabelledView(View):
    """A view with a label for every place."""

    labels: torch.Tensor
    """``[rows, length]`` int64, :data:`fused_objectives.targets.IGNORED` where there is no target."""
    capacity: int | None = None
    """On a GPU, a bound on the number of targets, so that the host need not wait for it; None: every place, there."""


class TermLoss(NamedTuple):
    """The loss of one term of an objective; or, without total, a number that the forward pass counts."""

    total: torch.Tensor | None
    """Scalar: Σ over samples of weight × sum; what the gradient is taken of."""
    sums: torch.Tensor
    """``[S]`` float32, detached: the sum of losses over each sample's targets, not weighted."""

    @staticmethod
    def counted(places: torch.Tensor, batch: Batch) -> TermLoss:
        """Return how many of the ``places [rows, length]`` bool each sample has."""
        return TermLoss(None, batch.sum_per_sample(places.float()))


class Objective(ABC):
    """One objective: how a batch is corrupted, and the loss of every sample.

    An objective has one or more *terms*, each a sum of losses and a count of targets for every sample. Of all factors
    only the samples' weights enter here, because the fused ops form gradients in the forward pass. The mean over the
    step's global count, and the sum over terms with :attr:`terms` as weights, are taken in one place for all
    (:class:`pretrain.model.multi_objective.MultiObjectiveModel`).
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    heads: tuple[str, ...]
    """Names of the components, besides the backbone, that this objective trains; its configuration may decide."""
    paired: ClassVar[bool] = False
    """Whether it needs an encoder–decoder, which reads a source and writes a target; the others take none."""
    needs_dropout: ClassVar[bool] = False
    """Whether the loss means nothing without dropout, so that dropout stays on when it is evaluated."""
    couples_samples: ClassVar[bool] = False
    """Whether samples decide each other's losses, so that none has a gradient of its own."""
    follows: ClassVar[bool] = False
    """Whether it takes up what others leave it in :attr:`MultiObjectiveModel.left` in the same forward pass, and comes
    after them."""
    rows_are_units: ClassVar[bool] = False
    """Whether rows decide what is trained, not samples: a sample's part then depends on the samples it shares its row
    with."""

    def __init__(self, config: Config, vocabulary: Vocabulary, seed: int, impl: str = "auto"):
        self.config, self.vocabulary, self.seed, self.impl = config, vocabulary, seed, impl

    @property
    def terms(self) -> dict[str, float]:
        """Term → weight within the objective."""
        return {self.name: 1.0}

    @property
    def fractions(self) -> dict[str, str]:
        """What is logged as a fraction: a tally, or a number that the forward pass counts → the term of whose targets
        it counts some."""
        return {}

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations of the store that batches must bring: name → kind."""
        return {}

    @property
    def rows_together(self) -> int:
        """How many consecutive rows of the global batch must be in one micro-batch."""
        return 1

    @property
    def notes(self) -> list[str]:
        """What the user should know of the objective's own data, in sentences."""
        return []

    @property
    def fingerprint(self) -> str | None:
        """Of the data that the objective has beside the store, if any; a run is not resumed on other data."""
        return None

    def prepare(self, tokenizer: PreTrainedTokenizerFast, longest: int) -> None:  # noqa: B027  (most have no data)
        """Read what the objective trains on beside the store, with the store's tokenizer and the length of its longest
        sample; before anything is built of it. An export needs none of that and does without."""

    def check(self, encoder: Encoder) -> None:  # noqa: B027  (most fit every backbone)
        """Raise :class:`UserError` if the objective cannot be trained on this backbone; else note what corruption needs
        to know of it."""

    def meet(self, others: Mapping[str, Objective]) -> None:  # noqa: B027  (most need no other)
        """Take note of the recipe's objectives, this one among them; raise :class:`UserError` if one is missing that
        this one builds on."""

    @abstractmethod
    def build_heads(self, encoder: Encoder) -> dict[str, nn.Module]:
        """Build the components named in :attr:`heads`, but for those that another must build, as :meth:`meet` asks; a
        component that another objective built already is shared."""

    @abstractmethod
    def corrupt(self, batch: Batch, progress: float) -> View:
        """Return the objective's view of a batch: a function of (seed, sample, visit) and of the run's ``progress``
        in 0..1."""

    def heldout_view(self, batch: Batch) -> View:
        """Return the view of held-out rows by which the objective is judged: the same every time."""
        return self.corrupt(batch, progress=0.0)

    @abstractmethod
    def loss(self, model: MultiObjectiveModel, view: View, weights: torch.Tensor | None = None) -> dict[str, TermLoss]:
        """Return term → loss, and tally → what the forward pass counts; ``weights [S]`` float32 are the samples', None
        means 1."""


REGISTRY: dict[str, type[Objective]] = {}


def register(objective: type[Objective]) -> type[Objective]:
    """Make an objective available to recipes under its name."""
    REGISTRY[objective.name] = objective
    return objective


def parse_objectives(values: dict, where: str) -> dict[str, Config]:
    """Validate the recipe's ``objectives``: name → keys; a wrong one is a :class:`UserError` naming file and key."""
    if not values:
        raise UserError(f"{where}: objectives: name at least one of {', '.join(sorted(REGISTRY))}")
    configs = {}
    for name, keys in values.items():
        if name not in REGISTRY:
            raise unknown("objective", name, REGISTRY, f"{where}: objectives")
        configs[name] = parse(REGISTRY[name].Config, {} if keys is None else keys, where, ("objectives", name))
    return configs


def build_objectives(
    configs: dict[str, Config], vocabulary: Vocabulary, seed: int, impl: str = "auto"
) -> dict[str, Objective]:
    """Build the objectives of a recipe, by name; ``impl`` says which implementation their ops take."""
    return {name: REGISTRY[name](config, vocabulary, seed, impl) for name, config in configs.items()}
