"""``medley slurm``: prints ``launch/slurm/pretrain.sbatch`` for a recipe, its settings checked and filled in."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from pretrain.errors import UserError
from pretrain.recipe import load_recipe
from pretrain.training.ds_config import resolve_ds_config

_ROOT = Path(__file__).parents[1]
TEMPLATE = _ROOT / "launch" / "slurm" / "pretrain.sbatch"
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_EARLIER_SECONDS = 60
"""SLURM's signal before the end may come that much sooner than asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley slurm``; the script's own settings are the defaults."""
    own = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", TEMPLATE.read_text(encoding="utf-8"), re.MULTILINE))
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="what is trained")
    add("overrides", nargs="*", metavar="key=value", help="recipe keys to override, dotted")
    add("--ds_config", metavar="FILE", help="DeepSpeed JSON (default: zero2-bf16.json, without GPUs cpu.json)")
    for names, default, text in (
        (["--nodes"], own["nodes"], "machines"),
        (["--gpus"], own["gpus-per-node"], "GPUs of a node, one rank each; 0 trains on CPUs"),
        (["--tasks-per-node"], None, "ranks of a node where --gpus is 0"),
        (["--cpus-per-task", "--cpus-per-gpu"], own["cpus-per-task"], "cores of a rank"),
        (["--save-before"], own["signal"].partition("@")[2], "seconds before the limit when the run is told to save"),
        (["--chain"], 1, "jobs, each after the one before; one alone requeues itself"),
        (["--restarts"], 3, "that a start which came to nothing, not to a new checkpoint, is tried again"),
    ):
        help_text = text if default is None else f"{text} (default: {default})"
        add(*names, type=int, default=default, metavar="N", help=help_text)
    add("--time", default=own["time"], help="limit of one start, as SLURM writes it (default: %(default)s)")
    for name in ("partition", "account", "job-name"):
        add(f"--{name}", metavar="NAME")
    add("--mem", help="memory of a node, as SLURM writes it; 0: all of it")
    add("--array", metavar="SEEDS", help="a run for each seed, as SLURM writes it: 0-4, 1,3,5 or 0-9%%2")


def run(args: argparse.Namespace) -> None:
    """Print the script.

    Raises:
        UserError: if recipe, DeepSpeed JSON or options are wrong, or do not fit together.
    """
    print(script(args), end="")


def script(args: argparse.Namespace) -> str:
    """Return the script for checked arguments, to be submitted from anywhere; its paths are taken from this folder."""
    for name in ("nodes", "gpus", "tasks_per_node", "cpus_per_task", "save_before", "chain", "restarts"):
        value, least = getattr(args, name), 0 if name in ("gpus", "restarts") else 1
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: must be at least {least}, not {value}")
    if args.gpus and args.tasks_per_node not in (None, args.gpus):
        raise UserError(f"--tasks-per-node: a rank has one GPU, and --gpus is {args.gpus}; leave one of them out")
    if seconds(args.time) <= args.save_before + _EARLIER_SECONDS:
        raise UserError(
            f"--time: {args.time} leaves nothing before the signal to save, {args.save_before} s before the end and up "
            f"to {_EARLIER_SECONDS} s sooner; ask for more, or lower --save-before"
        )
    if args.array is not None and not _ARRAY.fullmatch(args.array):
        raise UserError(f"--array: '{args.array}' is not of the form 0-4, 1,3,5 or 0-9%2")
    if args.array is not None and any(text.startswith("seed=") for text in args.overrides):
        raise UserError("seed: --array gives every run its own; leave one of them out")
    tasks = args.gpus or args.tasks_per_node or 1
    ds_config = args.ds_config or str(_ROOT / "configs" / "ds" / ("zero2-bf16.json" if args.gpus else "cpu.json"))
    recipe = load_recipe(args.recipe, args.overrides)
    training = recipe.training
    with recipe.named_in_errors():
        if not recipe.run.isprintable():
            raise UserError(f"run: {recipe.run!r} has characters that a job script cannot pass on")
        resolve_ds_config(
            ds_config,
            micro_batch_rows=training.micro_batch_rows,
            batch_rows=training.batch_rows,
            world_size=args.nodes * tasks,
            gradient_clipping=training.gradient_clipping,
            device_type="cuda" if args.gpus else "cpu",
        )
    options = {
        "job-name": args.job_name or Path(args.recipe).stem,
        "nodes": args.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": args.gpus or None,
        "cpus-per-task": args.cpus_per_task,
        "time": args.time,
        "signal": f"B:USR1@{args.save_before}",
        "partition": args.partition,
        "account": args.account,
        "mem": args.mem,
        "array": args.array,
        "chdir": Path.cwd(),
    }
    settings = {
        "python": shlex.quote(sys.executable),
        "train": shlex.quote(str(_ROOT / "launch" / "train.py")),
        "ds_config": shlex.quote(ds_config),
        "recipe": shlex.quote(args.recipe),
        "run": shlex.quote(recipe.run),
        "overrides": f"({shlex.join(text for text in args.overrides if not text.startswith('run='))})",
        "chain": str(args.chain),
        "restarts": str(args.restarts),
    }
    return _filled_in(TEMPLATE.read_text(encoding="utf-8"), options, settings)


def seconds(time: str) -> int:
    """Return the seconds of a limit as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes or days-hours:minutes:seconds."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: '{time}' is no limit; write minutes, hours:minutes:seconds or days-hours")
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is None and len(fields) < 3:
        fields = [0, *fields]  # minutes come first
    hours, minutes, rest = [*fields, 0, 0][:3]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _filled_in(text: str, options: dict, settings: dict[str, str]) -> str:
    """Return a script with other values; where an option is None, as it is, but for GPUs: then it asks for none."""
    for name, value in options.items():
        if value is not None:
            text = _replaced(rf"##?SBATCH --{name}=", f"#SBATCH --{name}={shlex.quote(str(value))}", text)
    if options["gpus-per-node"] is None:
        text = _replaced("#SBATCH --gpus-per-node=", "##SBATCH --gpus-per-node=0", text)
    for name, value in settings.items():
        text = _replaced(rf"{name}=", f"{name}={value}", text)
    return text


def _replaced(start: str, line: str, text: str) -> str:
    text, count = re.subn(rf"^{start}.*$", lambda match: line, text, count=1, flags=re.MULTILINE)
    assert count == 1, f"{TEMPLATE} has no line {start}"
    return text
