"""``medley evaluate``: fine-tune a model on an end task over several seeds; print a table, write JSON."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from pretrain.data.tasks import GLUE, Task, load_task
from pretrain.errors import UserError
from pretrain.evaluation.finetune import Settings
from pretrain.evaluation.metrics import CLASSIFICATION, REGRESSION
from pretrain.evaluation.protocol import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley evaluate``."""
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder or name, a run folder or a checkpoint folder"
    )
    parser.add_argument("--untrained", action="store_true", help="same architecture, random weights: the control")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: MODEL/evaluation-TASK.json)")
    add_task_arguments(parser, required=True)


def add_task_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declare what names a task and says how to fine-tune on it; see :func:`chosen_task`, :func:`chosen_settings`."""
    task = parser.add_argument_group("task")
    task.add_argument(
        "--task",
        required=required,
        help="a folder with train, dev and test as .jsonl, .tsv or .csv; hf:NAME; or a GLUE task: " + ", ".join(GLUE),
    )
    task.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set hf:NAME")
    task.add_argument("--text-field", metavar="FIELD", help="default: text, or text_a")
    task.add_argument("--pair-field", metavar="FIELD", help="field of the second text (default: text_b beside text_a)")
    task.add_argument("--label-field", metavar="FIELD", default="label", help="default: %(default)s")
    task.add_argument("--regression", action="store_true", help="labels are numbers, not classes")
    tuning = parser.add_argument_group("fine-tuning")
    defaults = Settings()
    tuning.add_argument("--epochs", type=int, default=defaults.epochs, help="default: %(default)s")
    tuning.add_argument("--lr", type=float, default=defaults.lr, help="peak learning rate (default: %(default)s)")
    tuning.add_argument("--batch", type=int, default=defaults.batch, help="samples a step (default: %(default)s)")
    tuning.add_argument("--max-length", type=int, default=defaults.max_length, help="tokens (default: %(default)s)")
    tuning.add_argument("--seeds", type=int, default=defaults.seeds, metavar="N", help="seeds 0 to N-1 (default: 5)")
    tuning.add_argument("--patience", type=int, metavar="N", help="end after N epochs without improvement on dev")
    tuning.add_argument("--max-train", type=int, metavar="N", help="use at most N training samples")
    tuning.add_argument(
        "--metric", help=f"chooses the epoch: {', '.join(CLASSIFICATION)}; for regression {', '.join(REGRESSION)}"
    )


def chosen_task(args: argparse.Namespace) -> Task:
    """Load the task that the arguments name.

    Raises:
        UserError: as :func:`~pretrain.data.tasks.load_task`.
    """
    return load_task(
        args.task,
        text_field=args.text_field,
        pair_field=args.pair_field,
        label_field=args.label_field,
        config=args.dataset_config,
        regression=args.regression,
    )


def chosen_settings(args: argparse.Namespace) -> Settings:
    """Return how to fine-tune; raises :class:`UserError` if a number is out of range."""
    return Settings(
        epochs=args.epochs,
        lr=args.lr,
        batch=args.batch,
        max_length=args.max_length,
        seeds=args.seeds,
        patience=args.patience,
        max_train=args.max_train,
        metric=args.metric,
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate and report.

    Raises:
        UserError: if model, task, settings or output cannot be used; the output is tried before the work begins.
    """
    settings = dataclasses.replace(chosen_settings(args), untrained=args.untrained)
    task = chosen_task(args)
    out = args.out or default_output(args.model, task.name, args.untrained)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: cannot be written; name another file with --out")
    result = evaluate(args.model, task, settings)
    write(result, out)
    print(table(result))
    print(f"written: {out}")


def write(result: dict, out: Path) -> None:
    """Write a result as JSON; the file is there whole or not at all."""
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(out)


def default_output(model: str, task: str, untrained: bool) -> Path:
    """Return the file in the model's folder that holds the scores on ``task``; the control never overwrites them."""
    if not Path(model).is_dir():
        return Path("evaluation-untrained.json" if untrained else "evaluation.json")
    return Path(model) / f"evaluation-{task}{'-untrained' if untrained else ''}.json"


def table(result: dict) -> str:
    """Lay out a result of :func:`~pretrain.evaluation.protocol.evaluate`: a line a metric, mean ± sd over seeds."""

    def cell(split: str, name: str) -> str:
        mean, sd = result["mean"][split][name], result["sd"][split][name]
        return f"{mean:.4f} ± {'n/a' if sd is None else f'{sd:.4f}'}"

    samples, seeds = result["samples"], len(result["runs"])
    untrained = " (untrained)" if result["settings"]["untrained"] else ""
    lines = [
        f"{result['task']}: {result['model']}{untrained}, {seeds} {'seed' if seeds == 1 else 'seeds'}, "
        f"{samples['train']} / {samples['dev']} / {samples['test']} samples; * chooses the epoch on dev",
        f"{'':12}{'dev':>18}{'test':>18}{result['baseline']['name']:>10}",
    ]
    for name, floor in result["baseline"]["values"].items():
        marked = f"{name} *" if name == result["metric"] else name
        lines.append(f"{marked:12}{cell('dev', name):>18}{cell('test', name):>18}{floor:>10.4f}")
    return "\n".join(lines)
