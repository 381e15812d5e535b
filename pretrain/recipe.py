"""The recipe: everything that decides what is trained, as one strict tree."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, PrivateAttr

from pretrain.config import Config, apply_overrides, parse, read_yaml
from pretrain.data.local_cache import CacheConfig
from pretrain.errors import UserError
from pretrain.influence import WeigherConfig, parse_weigher
from pretrain.model.encoder import ModelConfig
from pretrain.objectives.base import parse_objectives
from pretrain.sampling import SamplerConfig, parse_sampler
from pretrain.schedule import ScheduleConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Config):
    """Which samples, and how they are laid out in rows."""

    store: str
    """Folder that ``medley prepare`` wrote."""
    packing: bool = True
    """Several samples a row, or (``off``) one, padded."""
    row_length: int | None = Field(None, ge=8)
    """Places a row, in tokens; null takes the longest sample, or with packing four times that."""
    packing_window: int = Field(4096, ge=1)
    """Samples that are packed together; more fill the rows better and cost start-up time."""
    cache: CacheConfig | None = None
    """Copies of the store's files on each node's own disk, made while training; null makes none."""


class OptimizerConfig(Config):
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon`` takes the matrices of the trunk, AdamW the rest."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak."""
    learning_rate_scales: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Component (``backbone``, ``generator``, ``head/NAME``) → factor on its learning rate; 1 if absent."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled; not on vectors (biases, norms)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW's decay of the first and second moments."""
    eps: float = Field(1e-6, gt=0)
    momentum: Fraction = 0.95
    """Muon's."""


class TrainingConfig(Config):
    """How long, in what steps."""

    steps: int = Field(..., ge=1)
    """Optimizer steps."""
    batch_rows: int = Field(64, ge=1)
    """Rows in a global batch."""
    micro_batch_rows: int = Field(16, ge=1)
    """Rows one rank runs at once; accumulation follows from it and the world size."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest norm of the global gradient; 0 does not clip."""
    non_finite_limit: int = Field(10, ge=1)
    """Consecutive steps with a loss or gradient that is not finite after which the run stops."""


class HeldoutConfig(Config):
    """Losses on held-out text, measured during training."""

    interval_steps: int = Field(0, ge=0)
    """Steps between measurements; 0 measures at the start and the end only."""
    rows: int = Field(64, ge=0)
    """Rows of held-out text, the same ones every time, rounded up to whole micro-batches of all ranks; 0 measures
    nothing."""


class StoppingConfig(Config):
    """Early stopping by the score on the end task's dev split."""

    interval_steps: int = Field(0, ge=0)
    """Steps between scorings, the last step always included; 0 scores nothing and stops nothing."""
    patience: int = Field(20, ge=1)
    """Scorings without improvement after which the run ends."""
    metric: str | None = None
    """What shall rise; null: accuracy, or Spearman's correlation for numbers."""


class CheckpointConfig(Config):
    """When the run is saved."""

    interval_steps: int = Field(1000, ge=1)
    keep: int = Field(3, ge=1)
    """How many checkpoints stay."""


class LogConfig(Config):
    """Where the run tells what it does, besides ``metrics.jsonl`` and TensorBoard."""

    interval_steps: int = Field(10, ge=1)
    """Steps between status lines."""
    trackers: list[Literal["wandb", "trackio"]] = []
    """More places to log to, if installed."""
    peak_tflops: float | None = Field(None, gt=0)
    """One device's peak, for the model FLOPs utilisation; known GPUs need none."""


class Recipe(Config):
    """What is trained. ``configs/recipes/`` has examples."""

    run: str = Field(..., min_length=1)
    """Folder of the run: configuration, metrics, checkpoints."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides every random choice of the run."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objectives: dict[str, Any]
    """Objective → its keys."""
    sampler: dict[str, Any] = {}
    """Which objectives a step trains: the sampler's ``name`` and its keys."""
    weigher: dict[str, Any] = {}
    """How much each sample of a step counts: the weigher's ``name`` and its keys."""
    training: TrainingConfig
    heldout: HeldoutConfig = HeldoutConfig()
    stopping: StoppingConfig = StoppingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    impl: Literal["auto", "triton", "torch"] = "auto"
    """What computes corruption and losses: Triton kernels or plain torch; the masks are the same bit for bit. ``auto``
    takes the kernels on a GPU."""

    _objective_configs: dict[str, Config] = PrivateAttr()
    _sampler_config: SamplerConfig = PrivateAttr()
    _weigher_config: WeigherConfig = PrivateAttr()
    _source: str = PrivateAttr("recipe")

    @property
    def objective_configs(self) -> dict[str, Config]:
        """Objective → its validated configuration."""
        return self._objective_configs

    @property
    def sampler_config(self) -> SamplerConfig:
        """The sampler's validated configuration."""
        return self._sampler_config

    @property
    def weigher_config(self) -> WeigherConfig:
        """The weigher's validated configuration."""
        return self._weigher_config

    @property
    def source(self) -> str:
        """The file the recipe came from, for messages."""
        return self._source

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Put the recipe's file before errors that begin with one of its keys; the parts do not know the file."""
        try:
            yield
        except UserError as error:
            if str(error).split(":")[0].split(".")[0] in type(self).model_fields:
                raise UserError(f"{self.source}: {error}") from None
            raise

    def save(self, path: Path) -> None:
        """Write the recipe as resolved, every default spelled out."""
        document = self.model_dump(mode="json", by_alias=True)
        configs = self.objective_configs.items()
        document["objectives"] = {name: config.model_dump(mode="json", by_alias=True) for name, config in configs}
        document["sampler"] = self.sampler_config.model_dump(mode="json", by_alias=True)
        document["weigher"] = self.weigher_config.model_dump(mode="json", by_alias=True)
        path.write_text(yaml.safe_dump(document, sort_keys=False))


R = TypeVar("R", bound=Recipe)


def load_recipe(path: str | Path, overrides: list[str] | None = None, kind: type[R] = Recipe) -> R:
    """Read and validate a recipe of some kind; anything wrong is a one-line :class:`UserError` naming file and dotted
    key."""
    where = str(path) if not overrides else f"{path} with command-line overrides"
    return recipe_from(apply_overrides(read_yaml(path), overrides or []), where, kind)


def recipe_from(document: dict, where: str, kind: type[R] = Recipe) -> R:
    """Validate a recipe given as nested dictionaries."""
    recipe = parse(kind, document, where)
    recipe._objective_configs = parse_objectives(recipe.objectives, where)
    recipe._sampler_config = parse_sampler(recipe.sampler, where)
    recipe._weigher_config = parse_weigher(recipe.weigher, where)
    recipe._source = where
    return recipe
