"""``medley tartan``: the whole of TARTAN (arXiv 2109.07437). An end task is trained together with auxiliary objectives
until its dev score rises no more, then alone from the best step; test is looked at once."""

import argparse
import dataclasses
import json
from pathlib import Path

from pretrain.data.store import Store
from pretrain.errors import UserError
from pretrain.evaluation import Settings, evaluate
from pretrain.evaluation.command import default_output, table, write
from pretrain.evaluation.model import quiet
from pretrain.export import export
from pretrain.recipe import Recipe, load_recipe
from pretrain.training import checkpoint
from pretrain.training.early_stopping import END_TASK
from pretrain.training.run import PRETRAINING, launch
from pretrain.training.run import add_arguments as add_run_arguments
from pretrain.training.saving import STATE

_CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = {name: _CONFIGS / "recipes" / f"tartan-{name}.yaml" for name in ("meta", "mt")}
"""Method → recipe of the joint stage: weights learnt from the dev gradient, or equal ones."""
LAST_STAGE = Settings(epochs=10, lr=5e-6, patience=3, seeds=1)
"""Fine-tuning on the end task alone, as in the paper."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley tartan``."""
    add = parser.add_argument
    add("--task", required=True, help="the end task: a folder, hf:NAME or the name of a GLUE task")
    add("--corpus", required=True, metavar="STORE", help="text of the domain, prepared with the model's tokenizer")
    add("--model", required=True, help="a Hugging Face folder or name to begin with")
    add("--out", required=True, type=Path, metavar="RUN", help="folder of the run; what is done there is not repeated")
    add("--method", choices=METHODS, default="meta", help="learnt or equal weights (default: %(default)s)")
    add("--seed", type=int, default=0, help="of both stages (default: %(default)s)")
    add("--metric", help="chooses step and epoch on dev (default: accuracy, or spearman for numbers)")
    add("--ds_config", default=str(_CONFIGS / "ds" / "cpu.json"), metavar="FILE", help="DeepSpeed JSON: how it is run")
    tuning = parser.add_argument_group("fine-tuning")
    for name in ("epochs", "lr", "batch", "patience"):
        default = getattr(LAST_STAGE, name)
        tuning.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Do what is left of both stages and report.

    Raises:
        UserError: if task, corpus, model, settings or folder cannot be used.
        SystemExit: with the exit code of a training that failed.
    """
    chosen = {name: getattr(args, name) for name in ("epochs", "lr", "batch", "patience", "metric")}
    settings = dataclasses.replace(LAST_STAGE, first_seed=args.seed, **chosen)
    args.config, args.dry_run = str(METHODS[args.method]), False
    args.overrides = [*_as_keys(args), *args.overrides, f"run={json.dumps(str(args.out))}"]
    if not load_recipe(args.config, args.overrides).stopping.interval_steps:
        raise UserError("stopping.interval_steps: the last stage begins at the best step on dev; set it above 0")
    if code := launch(args, PRETRAINING):
        raise SystemExit(code)
    recipe = load_recipe(args.out / "config.yaml")
    joint = joint_stage(recipe)
    if joint is None:
        print("the joint stage is not done; the same command goes on from there")
        return
    result, out = last_stage(recipe, joint, settings)
    score = f"{joint['metric'] or 'score'} {joint['dev']:.4f} on dev"
    print(
        f"{recipe.sampler_config.name}, seed {recipe.seed}: {joint['steps']} steps, best {joint['best_step']}: {score}"
    )
    print(table(result))
    print(f"written: {out}")


def joint_stage(recipe: Recipe) -> dict | None:
    """Return what a finished joint stage came to; None while steps are left."""
    newest = checkpoint.newest(Path(recipe.run))
    state = json.loads((newest / STATE).read_text())
    stopping = state["stopping"]
    if state["step"] < recipe.training.steps and stopping["unimproved"] < recipe.stopping.patience:
        return None
    return {
        "sampler": recipe.sampler_config.name,
        "steps": state["step"],
        "best_step": stopping["best_step"],
        "metric": recipe.stopping.metric,
        "dev": stopping["best"],
    }


def last_stage(recipe: Recipe, joint: dict, settings: Settings) -> tuple[dict, Path]:
    """Fine-tune the joint stage's best step on the end task alone, unless that is done; return the result, that of
    :func:`pretrain.evaluation.evaluate` with ``joint`` in it, and its file."""
    run, config = Path(recipe.run), recipe.objective_configs[END_TASK]
    task = config.load()
    out = default_output(str(run), task.name, untrained=False)
    longest = config.max_length or Store(Path(recipe.data.store) / "train").max_length
    settings = dataclasses.replace(settings, max_length=longest)
    asked = {"joint": joint, "settings": dataclasses.asdict(settings)}
    if out.is_file():
        done = json.loads(out.read_text())
        if {key: done.get(key) for key in asked} == asked:
            return done, out
    result = evaluate(_exported(run), task, settings) | asked
    write(result, out)
    return result, out


def _exported(run: Path) -> Path:
    """Export the best step with the head that it has, where the family has such a head."""
    folder = run / "export"
    with quiet():
        try:
            return export(run, folder, "sequence-classification", overwrite=True, best=True)
        except UserError as error:
            print(f"note: {error}; the last stage begins with a new head")
            return export(run, folder, overwrite=True, best=True)


def _as_keys(args: argparse.Namespace) -> list[str]:
    """Return the command's options as keys of the recipe."""
    keys = {
        "seed": args.seed,
        "data.store": args.corpus,
        "model.checkpoint": args.model,
        f"objectives.{END_TASK}.task": args.task,
        "objectives.task_mlm.task": args.task,
        "stopping.metric": args.metric,
    }
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]
