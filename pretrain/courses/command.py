"""``medley soup``: average models of one initialisation, all of them or those that a greedy search keeps."""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save_file

from pretrain import __version__
from pretrain.courses.ingredients import (
    WEIGHTS,
    Ingredient,
    Weights,
    as_exports,
    check_alike,
    find_ingredients,
)
from pretrain.courses.soup import Tasting, average, greedy
from pretrain.data.output import whole_folder
from pretrain.data.tasks import Task
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import UserError
from pretrain.evaluation.command import add_task_arguments, chosen_settings, chosen_task
from pretrain.evaluation.finetune import Settings
from pretrain.evaluation.model import quiet
from pretrain.evaluation.protocol import choosing_metric, dev_score
from pretrain.export import KINDS, write_facts

MODES = ("uniform", "greedy")
RECORD = "soup.json"
MARKS = ("config.json", WEIGHTS, RECORD)  # what tells a soup from another folder
Say = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_soup(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    mode: str = "uniform",
    kind: str | None = None,
    task: Task | None = None,
    settings: Settings | None = None,
    any_start: bool = False,
    overwrite: bool = False,
    say: Say = _to_stderr,
) -> dict:
    """Average models into the Hugging Face folder ``out`` and return what its ``soup.json`` says.

    Args:
        paths: exports, checkpoints or runs.
        mode: ``uniform`` averages all; ``greedy`` those that do not lower the score on the task's dev split.
        kind: how checkpoints are exported; ``backbone`` leaves the heads of exports away, too.
        task: scores the soup and every ingredient by fine-tuning, on dev alone; ``greedy`` needs it.
        settings: of the fine-tuning.
        any_start: average ingredients, too, that do not say which weights they began with.
        overwrite: replace ``out`` if it is a soup.
        say: receives a line of progress at a time.

    Raises:
        UserError: if ingredients do not fit together, ``out`` exists or holds one of them, or ``greedy`` has no task.
    """
    out, settings = Path(out), settings or Settings()
    if mode == "greedy" and task is None:
        raise UserError("--mode greedy: chooses by a task's dev split; name the task with --task")
    metric = choosing_metric(task, settings) if task else None
    ingredients = find_ingredients(paths, kind)
    for each in ingredients:
        if out.resolve() in (each.source, *each.source.parents):
            raise UserError(f"{out}: holds the ingredient {each.name}; choose another --out")
    check_alike(ingredients, any_start=any_start)
    if kind not in (None, "backbone") and all(each.is_export for each in ingredients):
        raise UserError(
            f"--as {kind}: says how checkpoints are exported, but all ingredients are exports; leave it out"
        )
    for each in (each for each in ingredients if each.initialisation is None):
        say(f"note: {each.name} does not say which weights it began with; taken as it is (--any-start)")
    with whole_folder(out, overwrite, MARKS) as partial, as_exports(ingredients, kind, say) as weights:
        if task:
            jury = _Jury(ingredients, weights, task, settings, metric, say)
            tastings, dev = _taste(mode, len(weights), jury.score)
        else:
            tastings, dev = [Tasting(index, None, None, True) for index in range(len(weights))], None
        chosen = [each.ingredient for each in tastings if each.kept]
        starts = {ingredients[index].initialisation for index in chosen}
        record = {
            "format_version": 1,
            "mode": mode,
            "architectures": weights[0].architectures,
            "initialisation": starts.pop() if len(starts) == 1 else None,
            "ingredients": [_listed(ingredients[each.ingredient], each) for each in tastings],
            "dev": dev,
            "task": task.name if task else None,
            "metric": metric,
            "settings": dataclasses.asdict(settings) if task else None,
            "program": f"medley {__version__}",
        }
        say(f"averaging {len(chosen)} models")
        write_model([weights[index] for index in chosen], partial)
        write_facts(partial, record["initialisation"])
        (partial / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(record), encoding="utf-8")
    return record


def _taste(mode: str, count: int, score: Callable[[list[int]], float]) -> tuple[list[Tasting], float]:
    """Score all ingredients and find those to take; return the verdicts and the soup's score."""
    alone = [score([index]) for index in range(count)]
    if mode == "greedy":
        tastings = greedy(alone, score)
        return tastings, [each.together for each in tastings if each.kept][-1]
    return [Tasting(index, own, None, True) for index, own in enumerate(alone)], score(list(range(count)))


def _listed(ingredient: Ingredient, tasting: Tasting) -> dict:
    """Return what the record says of an ingredient."""
    return {
        "name": ingredient.name,
        "folder": str(ingredient.source),
        "initialisation": ingredient.initialisation,
        "dev_alone": tasting.alone,
        "dev_with_it": tasting.together,
        "kept": tasting.kept,
    }


def write_model(models: Sequence[Weights], folder: Path) -> None:
    """Write the average of some models as a Hugging Face folder, with the first one's configuration and tokenizer."""
    first = models[0]
    save_file(average(models), folder / WEIGHTS, {"format": "pt"})
    config = json.loads((first.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": first.architectures}, indent=2) + "\n")
    if (first.folder / "generation_config.json").is_file():
        shutil.copy(first.folder / "generation_config.json", folder)
    with quiet():
        load_tokenizer(first.folder).save_pretrained(folder)


class _Jury:
    """Scores averages of ingredients by fine-tuning them, on dev alone, and says what it does."""

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        weights: Sequence[Weights],
        task: Task,
        settings: Settings,
        metric: str,
        say: Say,
    ):
        self.names, self.weights = [each.name for each in ingredients], weights
        self.task, self.settings, self.metric, self.say = task, settings, metric, say
        self._told: set[str] = set()

    def score(self, members: list[int]) -> float:
        """Return the mean dev score of the average of ``members``."""
        names = " + ".join(self.names[index] for index in members)
        self.say(f"scoring {names}")
        with tempfile.TemporaryDirectory(prefix="medley-soup-") as folder:
            write_model([self.weights[index] for index in members], Path(folder))
            score = dev_score(folder, self.task, self.settings, self._tell)
        self.say(f"{names}: {self.metric} {score:.4f} on dev")
        return score

    def _tell(self, line: str) -> None:
        """Pass on what fine-tuning tells, notes only once."""
        if line not in self._told:
            self.say(line)
        if line.startswith("note: "):
            self._told.add(line)


def table(record: dict) -> str:
    """Lay out the record of a soup: a line an ingredient with its scores, if there are any, and one of the soup."""
    ingredients, scored, searched = record["ingredients"], record["task"] is not None, record["mode"] == "greedy"
    width = max(len("ingredient"), *(len(each["name"]) for each in ingredients))
    heads = ["dev alone"] * scored + ["dev with it"] * searched
    lines = ["  ".join([f"{'ingredient':{width}}", *heads])]
    for each in ingredients:
        scores = [f"{each['dev_alone']:9.4f}"] if scored else []
        scores += [f"{each['dev_with_it']:11.4f}  {'kept' if each['kept'] else 'left out'}"] if searched else []
        lines.append("  ".join([f"{each['name']:{width}}", *scores]))
    if scored:
        kept, seeds = sum(each["kept"] for each in ingredients), record["settings"]["seeds"]
        over = f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
        lines.append(f"soup of {kept}: {record['metric']} {record['dev']:.4f} on dev of {record['task']}, {over}")
    return "\n".join(lines)


def card(record: dict) -> str:
    """Return the README of a soup: what it is, how to load it, and what it is made of."""
    (loader,) = record["architectures"] or ["AutoModel"]
    began = record["initialisation"]
    start = f"All began with the same weights, `{began}`." if began else "Not all say which weights they began with."
    return f"""---
library_name: transformers
tags: [medley, model-soup]
---

# A {record["mode"]} soup

The mean of the weights of several models (model soups, arXiv 2203.05482), made with {record["program"]}. {start}

```python
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = {loader}.from_pretrained("THIS_FOLDER")
```

```
{table(record)}
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``medley soup``."""
    parser.add_argument(
        "ingredients", nargs="+", metavar="MODEL", help="exports, checkpoints, or runs (their newest good checkpoints)"
    )
    parser.add_argument(
        "--mode", choices=MODES, default="uniform", help="average all, or what the dev split keeps (default: uniform)"
    )
    parser.add_argument("--out", metavar="FOLDER", default="soup", help="default: %(default)s")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=KINDS,
        help="how checkpoints are exported (default: what fits the objectives); 'backbone': of exports, too, only that",
    )
    parser.add_argument(
        "--any-start", action="store_true", help="take what does not say which weights it began with, too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is a soup")
    add_task_arguments(parser, required=False)


def run(args: argparse.Namespace) -> None:
    """Run ``medley soup`` and print what it came to."""
    task = chosen_task(args) if args.task else None
    record = make_soup(
        args.ingredients,
        args.out,
        mode=args.mode,
        kind=args.kind,
        task=task,
        settings=chosen_settings(args),
        any_start=args.any_start,
        overwrite=args.overwrite,
    )
    print(table(record))
    began = record["initialisation"]
    print(f"began with: {began[:12]}…" if began else "began with: not known of all (--any-start)")
    print(f"averaged {sum(each['kept'] for each in record['ingredients'])} models → {args.out}")
