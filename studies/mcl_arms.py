"""What a study of MCL compares: ways to pre-train one backbone, at equal steps and at equal compute.

Compute is the FLOPs of forward and backward passes (:mod:`pretrain.training.flops`). The models of a soup share what
one of the other arms has, steps or compute.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from benchmarks.training import build_trainer
from pretrain.config import Config, parse, read_yaml
from pretrain.courses.soup import average, greedy
from pretrain.data.output import whole_folder
from pretrain.data.tasks import Task
from pretrain.errors import unknown
from pretrain.evaluation import Settings as Tuning
from pretrain.evaluation import evaluate
from pretrain.model.disentangled import folded
from pretrain.recipe import Recipe, recipe_from
from pretrain.training.build import build
from pretrain.training.flops import expected_flops_per_token
from pretrain.training.trainer import Trainer
from studies.models import save_model
from studies.tartan_arms import FAMILY

DS_CONFIG = Path(__file__).parents[1] / "configs" / "ds" / "zero0.json"
STEPS, COMPUTE = "steps", "compute"
"""What an arm has as much of as the others, or as the arm that it names."""
METRICS = {"chemprot": "micro_f1", "citation_intent": "macro_f1", "sciie": "macro_f1"}
"""Task → metric; accuracy for all others, and Spearman's correlation for numbers."""
_SPENT = "spent.json"


class Arm(Config):
    """One way to pre-train."""

    title: str
    objectives: dict[str, Any]
    """The recipe's section."""
    sampler: dict[str, Any] = {}
    """The recipe's section."""
    equal_compute_with: str | None = None
    """The arm whose compute it has in a second run."""
    steps: int | None = Field(None, ge=0)
    """Of a run; null: the study's."""
    mixes: list[dict[str, float]] = []
    """A soup's: objective → share, one a model; all objectives are mixed in every step."""
    trunk: float = Field(0.5, ge=0, lt=1)
    """Part of their steps that a soup's models have in common, trained under the mean of the mixes. Models that have
    only their random weights in common do not average well."""
    pick: Literal["uniform", "greedy"] = "uniform"
    """Which models of a soup are averaged."""

    @property
    def budgets(self) -> tuple[str, ...]:
        """What it is run at."""
        return (STEPS, COMPUTE) if self.equal_compute_with else (STEPS,)

    @property
    def runs(self) -> float:
        """Its steps, in those of one of its models."""
        return self.trunk + len(self.mixes) * (1 - self.trunk) if self.mixes else 1.0


@dataclass(frozen=True)
class Settings:
    """How large, how long, how fast; the same for all arms."""

    hidden: int = 128
    layers: int = 2
    steps: int = 400
    """Of an arm at equal steps."""
    batch_rows: int = 4
    """Packed rows a step, all of one micro-batch."""
    row_length: int = 128
    max_length: int = 64
    """Tokens of a sample, in pre-training and in fine-tuning."""
    lr: float = 1e-3
    tune_epochs: int = 8
    tune_lr: float = 5e-4
    tune_batch: int = 16
    tune_samples: int = 400
    """Training samples of a task at most; half as many of dev, twice as many of test."""


@dataclass(frozen=True)
class Place:
    """Where the study's arms meet."""

    corpus: Path
    tasks: dict[str, Task]
    """As limited."""
    runs: Path
    """Where models are trained."""


def read_arms(file: Path) -> dict[str, Arm]:
    """Return the arms of a YAML file.

    Raises:
        UserError: naming file and key, for what is not right.
    """
    arms = {name: parse(Arm, keys, str(file), (name,)) for name, keys in read_yaml(file).items()}
    for name, arm in arms.items():
        if arm.equal_compute_with not in (None, *arms):
            raise unknown("arm", arm.equal_compute_with, arms, f"{file}: {name}.equal_compute_with")
    return arms


def flops_per_token(arms: Mapping[str, Arm], at: Place, settings: Settings) -> dict[str, float]:
    """Return arm → FLOPs of its training a token, in expectation, with the models as they are at the start."""
    costs = {}
    for name, arm in arms.items():
        parts = build(_recipe(arm, _samplers(arm)[0], 0, 1, at, settings), dtype=torch.float32)
        batch = parts.loader(rank=0, world_size=1).next().micro_batches[0]
        shares = parts.sampler.probabilities(0)
        costs[name] = expected_flops_per_token(parts.model, batch, shares, mixes=parts.sampler.mixes)
    return costs


def steps_of(name: str, budget: str, arms: Mapping[str, Arm], costs: Mapping[str, float], settings: Settings) -> int:
    """Return how many steps an arm has; of a soup each of its models, with those that they have in common."""
    arm, steps = arms[name], settings.steps
    if arm.steps is not None:
        return arm.steps
    if budget == COMPUTE:
        steps *= costs[arm.equal_compute_with] / costs[name]
    return max(1, round(steps / arm.runs))


def pretrain(name: str, arm: Arm, budget: str, steps: int, seed: int, at: Place, settings: Settings) -> Path:
    """Pre-train an arm, unless it is done; return the folder of the model."""
    folder = at.runs / f"{name}-{budget}-{seed}"
    if not folder.is_dir():
        began = time.perf_counter()
        with whole_folder(folder, False, (_SPENT,)) as partial:
            if arm.mixes:
                spent = _soup(arm, steps, seed, at, settings, partial)
            else:
                with _training(arm, arm.sampler, seed, steps, at, settings) as trainer:
                    spent = _train(trainer, steps)
                    save_model(trainer.parts, partial)
            spent |= {"steps": steps, "pretraining_seconds": time.perf_counter() - began}
            (partial / _SPENT).write_text(json.dumps(spent))
    return folder


def score(model: Path, name: str, seed: int, at: Place, settings: Settings) -> dict:
    """Fine-tune a model on a task; return what the record tells of both."""
    tuned = _tune(model, name, seed, at, settings)
    return {"task": name, **tuned, **json.loads((model / _SPENT).read_text())}


def _tune(model: Path, name: str, seed: int, at: Place, settings: Settings) -> dict:
    tuning = Tuning(
        settings.tune_epochs,
        settings.tune_lr,
        settings.tune_batch,
        max_length=settings.max_length,
        seeds=1,
        first_seed=seed,
        metric=METRICS.get(name),
    )
    result = evaluate(model, at.tasks[name], tuning, log=lambda line: None)
    (run,), metric = result["runs"], result["metric"]
    scores = {split: run[split]["values"][metric] for split in ("dev", "test")}
    return {"metric": metric, **scores, "baseline": result["baseline"]["values"].get(metric, 0.0)}


def _train(trainer: Trainer, steps: int) -> dict[str, float]:
    """Train up to so many steps; return what was spent."""
    tokens = flops = 0.0
    while trainer.step < steps:
        record = trainer.train_step()
        tokens += record["tokens"]
        flops += record["tokens"] * trainer.flops.per_token(record["plan"])
    return {"tokens": tokens, "flops": flops}


def _soup(arm: Arm, steps: int, seed: int, at: Place, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train the models of a soup and write their average; return what was spent, and which were taken."""
    trunk, *samplers = _samplers(arm)
    models, in_common = [], round(arm.trunk * steps)
    with _training(arm, trunk, seed, steps, at, settings) as trainer:
        spent = [_train(trainer, in_common)]
        trainer.engine.save(folder / "trunk")
        state = trainer.state_dict()
    for sampler in samplers:
        with _training(arm, sampler, seed, steps, at, settings) as trainer:
            trainer.engine.load(folder / "trunk")
            trainer.load_state_dict(state)
            spent.append(_train(trainer, steps))
            whole = folded(trainer.parts.model.encoder.pretrained)
            models.append({key: tensor.clone() for key, tensor in whole.state_dict().items()})

    def write(taken: Sequence[int]) -> None:
        whole.load_state_dict(average([models[index] for index in taken]))
        whole.save_pretrained(folder)

    def dev(taken: Sequence[int]) -> float:
        write(taken)
        return sum(_tune(folder, name, seed, at, settings)["dev"] for name in at.tasks) / len(at.tasks)

    trainer.parts.tokenizer.save_pretrained(folder)
    taken = list(range(len(models)))
    if arm.pick == "greedy":
        taken = [each.ingredient for each in greedy([dev([index]) for index in taken], dev) if each.kept]
    write(taken)
    return {key: sum(each[key] for each in spent) for key in spent[0]} | {"taken": taken}


def _samplers(arm: Arm) -> list[dict[str, Any]]:
    """Return the sampler's sections: an arm's own; of a soup that of the trunk, then one a model."""
    if not arm.mixes:
        return [arm.sampler]
    mean = {name: sum(mix[name] for mix in arm.mixes) / len(arm.mixes) for name in arm.mixes[0]}
    return [{"name": "fixed", "mode": "mix", "shares": shares} for shares in (mean, *arm.mixes)]


@contextmanager
def _training(arm: Arm, sampler: dict, seed: int, steps: int, at: Place, settings: Settings) -> Iterator[Trainer]:
    trainer = build_trainer(_recipe(arm, sampler, seed, max(1, steps), at, settings), DS_CONFIG)
    try:
        yield trainer
    finally:
        trainer.engine.close()


def _recipe(arm: Arm, sampler: dict, seed: int, steps: int, at: Place, settings: Settings) -> Recipe:
    document = {
        "run": str(at.runs / "unused"),
        "seed": seed,
        "data": {"store": str(at.corpus), "row_length": settings.row_length},
        "model": {
            "family": FAMILY,
            "size": None,
            "dropout": 0.0,
            "overrides": {
                "hidden_size": settings.hidden,
                "num_hidden_layers": settings.layers,
                "num_attention_heads": max(1, settings.hidden // 64),
                "intermediate_size": 4 * settings.hidden,
            },
        },
        "objectives": arm.objectives,
        "sampler": sampler,
        "training": {
            "steps": steps,
            "batch_rows": settings.batch_rows,
            "micro_batch_rows": settings.batch_rows,
            "optimizer": {"learning_rate": settings.lr, "eps": 1e-8},
        },
        "heldout": {"rows": 0},
    }
    return recipe_from(document, arm.title)
