"""What a study of PRESENCE compares: models trained on a corpus with planted trouble, their samples weighed in several
ways, and how well scores tell the planted samples from the clean ones."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.presence import step_seconds
from benchmarks.training import build_trainer
from pretrain.data.batch import collate
from pretrain.data.output import whole_folder
from pretrain.data.tasks import Task, limit_split
from pretrain.evaluation import Settings as Tuning
from pretrain.evaluation import evaluate
from pretrain.influence.ghost import GhostNorms
from pretrain.influence.sample_log import read_sample_log
from pretrain.recipe import Recipe, recipe_from
from pretrain.training.trainer import Trainer
from studies.cloze_models import OBJECTIVE, SHALLOW
from studies.models import save_model
from studies.planting import TROUBLES, kinds_of

DS_CONFIG = Path(__file__).parents[1] / "configs" / "ds" / "zero0.json"
AGAINST = "uniform"
STEPS, COMPUTE = "steps", "compute"
"""What an arm has as much of as uniform weights have."""
FRACTIONS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Parts of the run after which samples are scored."""
SCORED_VISIT = 10**6
"""A visit that training does not reach, so that scored masks are none that were trained on."""
LOGGED_STEPS = 50
"""Of a run, whose weights are looked at."""
SIGNALS = ("influence", "loss")


@dataclass(frozen=True)
class Arm:
    """One way to weigh samples."""

    title: str
    weigher: dict
    """The recipe's section."""


ARMS = {
    AGAINST: Arm("uniform", {}),
    "novelty": Arm("PRESENCE, novelty (τ = +1)", {"name": "presence", "temperature": 1.0}),
    "stability": Arm("PRESENCE, stability (τ = −1)", {"name": "presence", "temperature": -1.0}),
    "two_stages": Arm("PRESENCE, both stages", {"name": "presence"}),
    "gentle": Arm(
        "PRESENCE, τ = −0.3, scores by length", {"name": "presence", "temperature": -0.3, "length_normalised": True}
    ),
    "shuffled": Arm("both stages, weights shuffled", {"name": "shuffled"}),
    "linupper": Arm("LinUpper", {"name": "linupper"}),
}


@dataclass(frozen=True)
class Settings:
    """How large, how long, how fast; the same for all arms."""

    size: str = "tiny"
    base_steps: int = 1500
    """Of pre-training on clean text of the same kind, once for all arms and seeds; 0: they begin from scratch. A model
    that has not learnt to read cannot tell scrambled text from any other."""
    base_lr: float = 4e-3
    steps: int = 800
    """Steps of an arm."""
    batch_rows: int = 4
    """Packed rows a step, all of one micro-batch."""
    row_length: int = 256
    max_length: int = 64
    """Tokens of a sample."""
    rate: float = 0.3
    """Of tokens that are masked."""
    lr: float = 4e-3
    heldout_rows: int = 64
    scored_samples: int = 64
    """Of each trouble; of clean ones as many as of all troubles together."""
    cost_rounds: int = 15
    """Steps of each way to weigh, by whose time steps of equal compute are counted."""
    tune_epochs: int = 3
    tune_lr: float = 1e-3
    tune_samples: int = 600
    """Training samples of the end task at most; half as many of dev, twice as many of test."""


@dataclass(frozen=True)
class Place:
    """Where the study's arms meet."""

    corpus: Path
    base: Path | None
    """The model that all arms begin with."""
    task: Task | None
    """As limited."""
    runs: Path
    """Where models are trained; they leave nothing there."""


def limited(task: Task, settings: Settings) -> Task:
    """Return the end task with as many samples as the settings allow."""
    most = {"train": settings.tune_samples, "dev": settings.tune_samples // 2, "test": 2 * settings.tune_samples}
    splits = {
        name: limit_split(split, most[name]) if len(split) > most[name] else split
        for name, split in task.splits.items()
    }
    return replace(task, splits=splits)


def pretrain_base(corpus: Path, out: Path, settings: Settings) -> float:
    """Pre-train the model that all arms begin with on clean text, and save it; return its held-out loss."""
    with whole_folder(out, False, ("config.json",)) as partial:
        at = replace(settings, lr=settings.base_lr)
        recipe = _recipe(Place(corpus, None, None, partial), at, 0, {}, settings.base_steps, partial / "run")
        trainer = build_trainer(recipe, DS_CONFIG)
        for _ in range(settings.base_steps):
            trainer.train_step()
        loss = trainer.heldout.losses()[OBJECTIVE]
        save_model(trainer.parts, partial)
        trainer.engine.close()
        shutil.rmtree(partial / "run")
    return loss


def cost_ratios(at: Place, settings: Settings) -> dict[str, float]:
    """Return arm → time of a step over that of a uniform one: medians of steps in turns, CPU time on a CPU.

    All that measure norms do the same work, so they share a ratio. LinUpper's uniform first steps are not counted.
    """
    trainer = build_trainer(_recipe(at, settings, 0, {}, 10 * settings.cost_rounds, at.runs / "costs"), DS_CONFIG)
    ways = {AGAINST: {}, "presence": {"name": "presence"}, "linupper": {"name": "linupper", "temperature": 1.0}}
    seconds = step_seconds(trainer, ways, settings.cost_rounds)
    trainer.engine.close()
    shutil.rmtree(at.runs / "costs")
    ratios = {way: float(np.median(np.divide(each, seconds[AGAINST]))) for way, each in seconds.items()}
    shared = {name: arm.weigher.get("name", AGAINST).replace("shuffled", "presence") for name, arm in ARMS.items()}
    return {name: ratios[way] for name, way in shared.items()}


def run_arm(arm: str, budget: str, seed: int, ratio: float, at: Place, settings: Settings) -> dict:
    """Train one arm with one seed, score it and fine-tune it on the end task; return its record.

    Args:
        budget: whether it may take as many steps as uniform weights, or as much compute.
        ratio: of a step's cost to that of a uniform one.
    """
    steps = settings.steps if budget == STEPS else max(1, round(settings.steps / ratio))
    run = at.runs / f"{arm}-{budget}-{seed}"
    trainer = build_trainer(_recipe(at, settings, seed, ARMS[arm].weigher, steps, run), DS_CONFIG)
    two_passes, detection = trainer.weighing.why_two_passes, []
    scorer = _Scorer(trainer, kinds_of(at.corpus), settings) if budget == STEPS else None
    due = {max(1, round(fraction * steps)): fraction for fraction in FRACTIONS}
    sizes = []
    for step in range(1, steps + 1):
        sizes.append(trainer.train_step()["effective_sample_size"])
        if scorer and step in due:
            detection.append({"fraction": due[step], "step": step, **scorer.aurocs()})
    heldout = trainer.heldout.losses()[OBJECTIVE]
    save_model(trainer.parts, run / "export")
    trainer.engine.close()
    tuned = _end_task(run / "export", seed, at, settings)
    record = {
        "arm": arm,
        "seed": seed,
        "budget": budget,
        "steps": steps,
        "two_passes": two_passes,
        "heldout_loss": heldout,
        "effective_sample_size": float(np.mean(sizes)),
        **tuned,
        "weights": _mean_weights(run, kinds_of(at.corpus)),
        "detection": detection,
    }
    shutil.rmtree(run)
    return record


def _recipe(at: Place, settings: Settings, seed: int, weigher: dict, steps: int, run: Path) -> Recipe:
    run.mkdir(parents=True, exist_ok=True)
    shape = {"family": "modernbert", "size": settings.size, "overrides": SHALLOW[settings.size]}
    document = {
        "run": str(run),
        "seed": seed,
        "data": {"store": str(at.corpus), "row_length": settings.row_length},
        "model": {"dropout": 0.0, **({"checkpoint": str(at.base)} if at.base else shape)},
        "objectives": {OBJECTIVE: {"masking": {"rate": settings.rate}}},
        "weigher": weigher,
        "training": {
            "steps": steps,
            "batch_rows": settings.batch_rows,
            "micro_batch_rows": settings.batch_rows,
            "optimizer": {"learning_rate": settings.lr},
        },
        "heldout": {"rows": settings.heldout_rows},
        "log": {"interval_steps": max(1, steps // LOGGED_STEPS)},
    }
    return recipe_from(document, "study")


class _Scorer:
    """Scores the same training samples, under the same masks, whenever it is asked."""

    def __init__(self, trainer: Trainer, kinds: np.ndarray, settings: Settings):
        parts, self.engine = trainer.parts, trainer.engine
        present = [kind for kind in range(1, 1 + len(TROUBLES)) if (kinds == kind).any()]
        wanted = {kind: settings.scored_samples for kind in present} | {0: settings.scored_samples * len(present)}
        chosen = np.concatenate([_spaced(np.flatnonzero(kinds == kind), number) for kind, number in wanted.items()])
        self.kinds = kinds[chosen]
        self.ghost = GhostNorms(parts.model, "first_block", "gram", impl=parts.recipe.impl)
        together = settings.row_length // parts.store.max_length
        rows = np.split(chosen, range(together, len(chosen), together))
        visits = [np.full(len(row), SCORED_VISIT) for row in rows]
        pad = parts.vocabulary.pad_id
        self.views = []
        for first in range(0, len(rows), settings.batch_rows):
            part = slice(first, first + settings.batch_rows)
            batch = collate(parts.store, rows[part], visits[part], 0, settings.row_length, pad)
            self.views.append(parts.model.objectives[OBJECTIVE].corrupt(batch.to(self.engine.device), progress=0.0))

    def aurocs(self) -> dict[str, dict[str, float]]:
        """Return signal → what :func:`against_clean` makes of it."""
        scores: dict[str, list[torch.Tensor]] = {signal: [] for signal in SIGNALS}
        for view in self.views:
            with self.ghost.recording(view.batch, deferred=True):  # so that no parameter has a gradient afterwards
                loss, sums = self.engine.run_apart({OBJECTIVE: view}, {OBJECTIVE: 1.0})
                torch.autograd.backward(loss)
            scores["influence"].append(self.ghost.squared_norms())
            scores["loss"].append(sums[OBJECTIVE] / view.counts[OBJECTIVE].clamp(min=1))
        found = {signal: torch.cat(each).cpu().numpy() for signal, each in scores.items()}
        return {signal: against_clean(each, self.kinds) for signal, each in found.items()}


def against_clean(scores: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Return trouble (and "all" troubles) → AUROC of ``scores [n]``: how often a spoilt sample's is higher than a clean
    one's; ``kinds [n]`` as :func:`studies.planting.kinds_of` gives them."""
    aurocs = {"all": float(roc_auc_score(kinds > 0, scores))}
    for kind, trouble in enumerate(TROUBLES, 1):
        asked = (kinds == 0) | (kinds == kind)
        if (kinds == kind).any():
            aurocs[trouble] = float(roc_auc_score(kinds[asked] > 0, scores[asked]))
    return aurocs


def _spaced(samples: np.ndarray, number: int) -> np.ndarray:
    return samples[np.unique(np.linspace(0, len(samples) - 1, min(number, len(samples))).astype(np.int64))]


def _mean_weights(run: Path, kinds: np.ndarray) -> dict[str, float] | None:
    """Return kind of sample → its mean weight in the steps that the run has logged; None if none was weighed."""
    records = read_sample_log(run)
    if not records:
        return None
    of = kinds[[sample for record in records for sample in record["sample_ids"]]]
    weights = np.array([weight for record in records for weight in record["weights"]])
    names = ("clean", *TROUBLES)
    return {name: float(weights[of == kind].mean()) for kind, name in enumerate(names) if (of == kind).any()}


def _end_task(model: Path, seed: int, at: Place, settings: Settings) -> dict:
    tuning = Tuning(
        settings.tune_epochs, settings.tune_lr, max_length=2 * settings.max_length, seeds=1, first_seed=seed
    )
    result = evaluate(model, at.task, tuning, log=lambda line: None)
    (tuned,) = result["runs"]
    metric = result["metric"]
    scores = {split: tuned[split]["values"][metric] for split in ("dev", "test")}
    return {"metric": metric, **scores, result["baseline"]["name"]: result["baseline"]["values"].get(metric, 0.0)}
