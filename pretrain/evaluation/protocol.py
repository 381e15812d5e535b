"""The evaluation of a model on a task: several seeds, their mean and spread, and the baseline to beat."""

import dataclasses
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from pretrain import __version__
from pretrain.data.tasks import Task, limit_train, load_task
from pretrain.errors import unknown
from pretrain.evaluation.finetune import Finetuner, SeedResult, Settings, encode, fine_tune
from pretrain.evaluation.metrics import baseline, metric_names, summarise, undefined_note
from pretrain.evaluation.model import (
    head_labels,
    hugging_face_source,
    input_names,
    load_classifier,
    load_tokenizer,
    longest_input,
)

FORMAT_VERSION = 1


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def evaluate(
    model: str | Path,
    task: Task | str | Path,
    settings: Settings | None = None,
    log: Callable[[str], None] = _to_stderr,
) -> dict:
    """Fine-tune ``model`` on ``task`` once a seed and return the scores, ready for JSON.

    ``model`` is a Hugging Face folder or name, or a run or checkpoint of ours; ``task`` a loaded task, or a folder,
    ``hf:NAME`` or GLUE name to load. ``log`` receives one line an epoch and one a note. The caller's random state
    is left as it was. docs/evaluate.md describes the result.

    Raises:
        UserError: if model, task or settings cannot be used.
    """
    settings = settings or Settings()
    task = task if isinstance(task, Task) else load_task(task)
    metric = choosing_metric(task, settings)
    if settings.max_train is not None:
        task = limit_train(task, settings.max_train)
    notes = _Notes(log, task.notes)
    results = _run_seeds(model, task, settings, metric, notes, log)
    for split in ("dev", "test"):
        notes.add(undefined_note(split, [getattr(result, split) for result in results]))
    untaught = baseline(task.splits["train"].labels, task.splits["test"].labels, task.regression)
    summary = {split: summarise([getattr(result, split).values for result in results]) for split in ("dev", "test")}
    return {
        "format_version": FORMAT_VERSION,
        "model": str(model),
        "task": task.name,
        "regression": task.regression,
        "label_names": task.label_names,
        "samples": {split: len(samples) for split, samples in task.splits.items()},
        "metric": metric,
        "settings": dataclasses.asdict(settings),
        "runs": [dataclasses.asdict(result) for result in results],
        "mean": {split: mean for split, (mean, _) in summary.items()},
        "sd": {split: sd for split, (_, sd) in summary.items()},
        "baseline": {"name": "mean" if task.regression else "majority", **dataclasses.asdict(untaught)},
        "notes": notes.lines,
        "versions": {
            "medley": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def dev_score(model: str | Path, task: Task, settings: Settings, log: Callable[[str], None] = _to_stderr) -> float:
    """Fine-tune ``model`` as :func:`evaluate` does and return the choosing metric on dev, the mean over the seeds; test
    is not looked at, so that models can be chosen by it."""
    metric = choosing_metric(task, settings)
    task = dataclasses.replace(task, splits={name: task.splits[name] for name in ("train", "dev")})
    if settings.max_train is not None:
        task = limit_train(task, settings.max_train)
    results = _run_seeds(model, task, settings, metric, _Notes(log, task.notes), log)
    return sum(result.dev.values[metric] for result in results) / len(results)


def choosing_metric(task: Task, settings: Settings) -> str:
    """Return the metric that chooses the epoch.

    Raises:
        UserError: if the settings name one of another kind of task.
    """
    names = metric_names(task.regression)
    metric = settings.metric or names[0]
    if metric not in names:
        raise unknown("metric", metric, names, "--metric")
    return metric


class _Notes:
    """Sentences the user must not miss: told when they arise and kept for the result."""

    def __init__(self, log: Callable[[str], None], lines: list[str]):
        self.log, self.lines = log, []
        for line in lines:
            self.add(line)

    def add(self, line: str | None) -> None:
        if line:
            self.lines.append(line)
            self.log(f"note: {line}")


def _run_seeds(
    model: str | Path, task: Task, settings: Settings, metric: str, notes: _Notes, log: Callable[[str], None]
) -> list[SeedResult]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with hugging_face_source(model) as source, torch.random.fork_rng(devices):
        return _run_source(source, task, settings, metric, notes, log)


def _run_source(
    source: str, task: Task, settings: Settings, metric: str, notes: _Notes, log: Callable[[str], None]
) -> list[SeedResult]:
    tokenizer = load_tokenizer(source)
    splits, results, known = {}, [], head_labels(source)
    fits = known == task.label_names  # numbers have no names, and a head for them another scale than the targets
    if not fits and known is not None and not settings.untrained:
        listed = ", ".join([*known[:5], *["…"] * (len(known) > 5)])
        notes.add(f"the model has a head for {listed}, which is not this task's: a new one is trained")
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        torch.manual_seed(seed)  # draws the head
        model, random = load_classifier(
            source,
            tokenizer,
            1 if task.regression else len(task.label_names),
            untrained=settings.untrained,
            new_head=not fits,
        )
        if not splits:
            if random:
                notes.add(
                    f"{len(random)} weights of the encoder are not in the model's files and start at random "
                    f"({', '.join(random[:3])}{', …' if len(random) > 3 else ''}): is the export whole?"
                )
            limit = min(settings.max_length, longest_input(model, tokenizer))
            if limit < settings.max_length:
                notes.add(f"the model takes {limit} tokens, fewer than --max-length {settings.max_length}")
            wanted = input_names(model, tokenizer)
            for name, split in task.splits.items():
                splits[name] = encode(split, tokenizer, wanted, limit, task.regression)
                if cut := splits[name].cut:
                    notes.add(f"{name}: {cut} of {len(split)} samples are longer than {limit} tokens and were cut")
        result = fine_tune(Finetuner(model, tokenizer, settings, task.regression), splits, metric, seed, log)
        if None in result.loss_by_epoch:
            notes.add(f"seed {seed}: the training loss was not finite; try a lower --lr")
        results.append(result)
    return results
