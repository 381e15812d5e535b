"""What a study of TARTAN compares, and what each arm may spend.

Everything is counted in passes of one token: forward is one pass, backward two. So training on a token costs 3 and
scoring it 1; padding costs nothing. All arms of a task have the same budget, so many epochs of fine-tuning with the
scoring of dev after each. Fine-tuning alone spends all of it; the others spend the last epochs on fine-tuning and the
rest on their first stage, whose steps are as many as fit. Scoring test is no part of it, nor is fitting the dev head to
features that are there.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.labelled import encode
from pretrain.data.store import Store
from pretrain.data.tasks import load_task
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import EXIT_DONE, RunError
from pretrain.evaluation import Settings as Tuning
from pretrain.evaluation import evaluate
from pretrain.export import export
from pretrain.tartan import METHODS
from pretrain.training import checkpoint, run
from pretrain.training.log import read_metrics

DS_CONFIG = Path(__file__).parents[1] / "configs" / "ds" / "zero0.json"
FAMILY = "roberta-prelayernorm"
"""RoBERTa with its norms before the layers, and RoBERTa's classifier: a small one learns far sooner than RoBERTa."""
ARMS = {"none": "fine-tuning alone", "tapt": "TAPT", "mt": "MT-TARTAN", "meta": "META-TARTAN"}
METRICS = {"chemprot": "micro_f1"}
"""Task → metric; macro-F1 for all others, and Spearman's correlation for numbers."""


@dataclass(frozen=True)
class Settings:
    """How large, how long, how fast; the same for all arms."""

    hidden: int = 128
    layers: int = 2
    base_steps: int = 3000
    """Of pre-training on the domain texts of all tasks, once for all arms and seeds."""
    base_lr: float = 3e-3
    epochs: int = 8
    """The budget: so many epochs of fine-tuning."""
    tune_epochs: int = 4
    """Of them what the arms with a first stage keep for the last one."""
    tune_lr: float = 1e-3
    first_lr: float = 1e-3
    """Of TAPT and of the joint stage, body and heads alike: a body this small takes the paper's rate of the heads."""
    batch: int = 16
    """Samples a step, of each objective."""
    dev_samples: int = 8
    """Of META-TARTAN's dev gradient; half as many fit its head. The paper has 64 for batches of 128."""
    scorings: int = 8
    """Of dev in a joint stage."""
    max_length: int = 64


@dataclass(frozen=True)
class Place:
    """One task of the study: its files, its corpus, the model that all arms begin with."""

    name: str
    task: Path
    corpus: Path
    base: Path
    runs: Path
    """Where first stages are trained; they leave nothing there."""


@dataclass(frozen=True)
class Costs:
    """Passes of tokens on one task."""

    epoch: int
    """One epoch of fine-tuning, and scoring dev after it."""
    scoring: int
    """Scoring dev."""
    step: dict[str, float]
    """Arm → one step of its first stage, in expectation."""

    def steps(self, arm: str, settings: Settings) -> int:
        """Return how many steps of its first stage an arm can afford."""
        left = (settings.epochs - settings.tune_epochs) * self.epoch
        if arm != "tapt":
            left -= settings.scorings * self.scoring
        return max(1, int(left / self.step[arm]))

    def spent(self, arm: str, settings: Settings) -> float:
        """Return what an arm spends in all, in expectation."""
        if arm == "none":
            return settings.epochs * self.epoch
        steps = self.steps(arm, settings)
        scorings = 0 if arm == "tapt" else -(-steps // interval(steps, settings))
        return settings.tune_epochs * self.epoch + steps * self.step[arm] + scorings * self.scoring


def interval(steps: int, settings: Settings) -> int:
    """Return the steps between two scorings of dev."""
    return -(-steps // settings.scorings)


def costs(place: Place, settings: Settings) -> Costs:
    """Count the tokens of a task and of its corpus."""
    tokenizer, task = load_tokenizer(place.corpus / "tokenizer"), load_task(place.task)
    tokens, mean = {}, {}
    for name, split in task.splits.items():
        lengths = encode(split, tokenizer, settings.max_length, 0, task.regression).lengths
        tokens[name], mean[name] = int(lengths.sum()), float(lengths.double().mean())
    corpus = Store(place.corpus / "train").meta
    drawn = settings.batch * mean["train"]
    joint = 3 * (2 * drawn + settings.batch * corpus["tokens"] / corpus["samples"])
    judged = (3 * settings.dev_samples + settings.dev_samples // 2) * mean["dev"]
    return Costs(
        epoch=3 * tokens["train"] + tokens["dev"],
        scoring=tokens["dev"],
        step={"tapt": 3 * drawn, "mt": joint, "meta": joint + judged},
    )


def pretrain_base(corpus: Path, out: Path, settings: Settings) -> None:
    """Pre-train the model that all arms begin with, and export it."""
    shape = {
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": max(1, settings.hidden // 64),
        "intermediate_size": 4 * settings.hidden,
    }
    keys = {
        "data": {"store": str(corpus), "row_length": 4 * settings.max_length},
        "model": {"family": FAMILY, "size": None, "dropout": 0.1, "overrides": shape},
        "objectives": {"mlm": {}},
        **_WITHOUT_END_TASK,
    }
    folder = out.with_name(f"{out.name}-run")
    _train("mt", folder, keys, settings.base_steps, max(1, settings.batch // 4), settings.base_lr)
    export(folder, out)
    shutil.rmtree(folder)


def run_arm(arm: str, place: Place, seed: int, settings: Settings) -> dict:
    """Do both stages of one arm on one task with one seed; return its record."""
    spending, folder = costs(place, settings), place.runs / f"{place.name}-{arm}-{seed}"
    epochs, start, first = settings.epochs, place.base, {}
    if arm != "none":
        epochs, start = settings.tune_epochs, folder / "export"
        first = _first_stage(arm, place, seed, settings, folder, spending.steps(arm, settings))
    task = load_task(place.task)
    metric = "spearman" if task.regression else METRICS.get(place.name, "macro_f1")
    tuning = Tuning(
        epochs, settings.tune_lr, settings.batch, settings.max_length, seeds=1, first_seed=seed, metric=metric
    )
    result = evaluate(start, task, tuning)
    shutil.rmtree(folder, ignore_errors=True)
    (tuned,) = result["runs"]
    return {
        "task": place.name,
        "arm": arm,
        "seed": seed,
        "metric": metric,
        "dev": tuned["dev"]["values"][metric],
        "test": tuned["test"]["values"][metric],
        "majority": result["baseline"]["values"].get(metric, 0.0),
        "epoch": tuned["epoch"],
        "passes": spending.spent(arm, settings),
        **first,
    }


def _first_stage(arm: str, place: Place, seed: int, settings: Settings, folder: Path, steps: int) -> dict:
    """Train and export what the last stage begins with; return what the record tells of it."""
    on_task = {"task": str(place.task), "max_length": settings.max_length}
    keys = {
        "seed": seed,
        "data.store": str(place.corpus),
        "model.checkpoint": str(place.base),
        "objectives": {"end_task": on_task, "task_mlm": on_task, "mlm": {}},
        "stopping": {"interval_steps": interval(steps, settings), "patience": steps},  # it chooses, and stops nothing
    }
    if arm == "meta":
        keys |= {"sampler.dev_samples": settings.dev_samples, "sampler.head_samples": settings.dev_samples // 2}
    if arm == "tapt":
        keys |= {"objectives": {"task_mlm": on_task}, **_WITHOUT_END_TASK}
    _train("meta" if arm == "meta" else "mt", folder, keys, steps, settings.batch, settings.first_lr)
    if arm == "tapt":
        export(folder, folder / "export")
    else:
        export(folder, folder / "export", "sequence-classification", best=True)
    records = read_metrics(folder)
    scored = {record["step"]: record["dev"] for record in records if "dev" in record}
    return {"steps": steps, "weights": records[-1]["probabilities"], "dev_of_first_stage": scored}


_WITHOUT_END_TASK = {"sampler": {}, "stopping": {}}


def _train(method: str, folder: Path, keys: dict, steps: int, batch: int, lr: float) -> None:
    """Train the recipe of a method with other keys; go on where an earlier attempt stopped.

    Raises:
        RunError: if it cannot be done, or was asked to stop.
    """
    keys |= {
        "run": str(folder),
        "training.steps": steps,
        "training.batch_rows": batch,
        "training.micro_batch_rows": batch,
        "training.optimizer.learning_rate": lr,
        "training.optimizer.learning_rate_scales": {},
        "heldout.rows": 0,
        "checkpoint.interval_steps": max(1, steps // 4),
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        code = run.main(["--ds_config", str(DS_CONFIG), "--config", str(METHODS[method]), *overrides])
    if code != EXIT_DONE or not checkpoint.folder_of(folder, steps).is_dir():
        raise RunError(f"{folder.name}: training was stopped or failed; the same command goes on from there")
    folder.with_suffix(".log").unlink()
