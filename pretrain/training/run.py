"""A training run from the command line: read, check, build, train. What ``launch/train.py`` calls."""

import argparse
import errno
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from pretrain.errors import UserError, unknown
from pretrain.masking.learning.live import LiveSpans
from pretrain.recipe import Recipe, load_recipe
from pretrain.training.beats import Progress
from pretrain.training.build import Parts, build, device_type
from pretrain.training.dry_run import dry_run
from pretrain.training.ds_config import resolve_ds_config
from pretrain.training.early_stopping import check_stopping
from pretrain.training.ending import Ending
from pretrain.training.engine import Engine, init_distributed, shutdown_distributed
from pretrain.training.log import RunLog, check_trackers
from pretrain.training.optimizer import OptimizerSettings, ParameterGroup
from pretrain.training.resuming import agree_on_start, resume, starting_point
from pretrain.training.stop import StopRequest
from pretrain.training.trainer import Trainer
from pretrain.training.watch import LIMIT_SECONDS, Watch, collective_timeout
from pretrain.training.weighing import check_weighing

_ROOT = Path(__file__).parents[2]
DEFAULT_RECIPE = _ROOT / "configs" / "recipes" / "quickstart.yaml"


@dataclass(frozen=True)
class Kind:
    """What sets one kind of run apart from others: pre-training, or learning something by it."""

    name: str = "train"
    """What the command's messages begin with."""
    recipe: type[Recipe] = Recipe
    build: Callable[..., Parts] = build
    trainer: type[Trainer] = Trainer
    lr_scales: Callable[[Recipe], dict[str, float]] = lambda recipe: {}
    """Component → factor on the learning rate, where it is not 1."""
    own_keys: tuple[str, ...] = ()
    """Keys of its recipe, beside those of every recipe, that a run is not resumed without."""


PRETRAINING = Kind()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every kind of run takes beside its recipe."""
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|CHECKPOINT", help="what to go on from (default: auto)"
    )
    default = LIMIT_SECONDS[device_type()]
    parser.add_argument(
        "--timeout",
        type=float,
        default=default,
        metavar="SECONDS",
        help=f"how long a rank may hang or be silent until the run ends (default: {default}; 0: for ever)",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to override, dotted")


def parser() -> argparse.ArgumentParser:
    """Return the command line of a training run."""
    parser = argparse.ArgumentParser(description="Pre-train a language encoder on one or many objectives.")
    parser.add_argument("--ds_config", required=True, metavar="FILE", help="DeepSpeed JSON: how it is run")
    parser.add_argument(
        "--config", default=str(DEFAULT_RECIPE), metavar="FILE", help="recipe: what is trained (default: quickstart)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, run one largest batch, print what it takes, exit"
    )
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code: 0 done or stopped after a save, 1 failed, 2 the user's mistake."""
    return launch(parser().parse_intermixed_args(argv), PRETRAINING)


def launch(args: argparse.Namespace, kind: Kind) -> int:
    """Do a run of some kind as one of its ranks; return the exit code as :func:`main` does.

    Args:
        args: ``ds_config``, ``config``, ``dry_run`` and those of :func:`add_arguments`.
    """
    stop, ending = StopRequest().install(), Ending(kind.name)
    try:
        with warnings.catch_warnings():
            # DeepSpeed calls collectives by names that torch is about to retire.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
            return ending.of(lambda: _run(args, kind, stop, ending))
    finally:
        stop.remove()
        shutdown_distributed()


def _run(args: argparse.Namespace, kind: Kind, stop: StopRequest, ending: Ending) -> None:
    if args.timeout < 0:
        raise UserError(f"--timeout: must be at least 0, not {args.timeout:g}")
    recipe = load_recipe(args.config, args.overrides, kind.recipe)
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    share_cores()
    with recipe.named_in_errors():
        ds_config = _ds_config(recipe, args.ds_config, world_size)
        check_trackers(recipe.log.trackers)
        bf16 = ds_config.get("bf16", {}).get("enabled", False)
        parts = kind.build(recipe, dtype=torch.bfloat16 if bf16 else torch.float32)
        lr_scales = _lr_scales(recipe, parts, kind)
        check_stopping(parts)
        check_weighing(parts, world_size)
        start = starting_point(recipe, args.resume, kind.own_keys) if not args.dry_run else None
    with _own_folder(recipe) if rank == 0 and not args.dry_run else nullcontext():
        init_distributed(collective_timeout(args.timeout, device_type()))
        ending.watch = Watch(args.timeout, ending.tell, None if args.dry_run else Path(recipe.run))
        engine = _engine(parts, ds_config, lr_scales, ending.watch.progress)
        if args.dry_run:
            page = dry_run(parts, engine)
            if rank == 0:
                print(page, flush=True)
        else:
            trainer = kind.trainer(parts, engine, stop)
            with recipe.named_in_errors():
                if start := agree_on_start(trainer, start, args.resume, kind.own_keys):
                    resume(trainer, start)
            _train(trainer, start, ds_config)


def _ds_config(recipe: Recipe, path: str, world_size: int) -> dict:
    return resolve_ds_config(
        path,
        micro_batch_rows=recipe.training.micro_batch_rows,
        batch_rows=recipe.training.batch_rows,
        world_size=world_size,
        gradient_clipping=recipe.training.gradient_clipping,
        device_type=device_type(),
    )


def _lr_scales(recipe: Recipe, parts: Parts, kind: Kind) -> dict[str, float]:
    """Return component → factor on the learning rate: the recipe's, times that of the kind of run."""
    given, own = recipe.training.optimizer.learning_rate_scales, kind.lr_scales(recipe)
    for name in given:
        if name not in parts.components:
            raise unknown("component", name, parts.components, "training.optimizer.learning_rate_scales")
    return {name: given.get(name, 1.0) * own.get(name, 1.0) for name in parts.components}


def _engine(parts: Parts, ds_config: dict, lr_scales: dict[str, float], progress: Progress) -> Engine:
    optimizer = parts.recipe.training.optimizer
    settings = OptimizerSettings(
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        momentum=optimizer.momentum,
    )
    groups = [ParameterGroup(name, params, lr_scales[name]) for name, params in parts.components.items()]
    return Engine(parts.model, groups, ds_config, settings, progress)


def _train(trainer: Trainer, start: Path | None, ds_config: dict) -> None:
    parts, engine, recipe = trainer.parts, trainer.engine, trainer.recipe
    if engine.rank == 0:
        recipe.save(trainer.run / "config.yaml")
        (trainer.run / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")
        trainer.log = RunLog(
            Path(recipe.run),
            first_step=trainer.step,
            steps=recipe.training.steps,
            interval_steps=recipe.log.interval_steps,
            trackers=recipe.log.trackers,
            settings=recipe.model_dump(mode="json"),
        )
    try:
        size, precision = sum(parts.sizes.values()), str(engine.dtype).removeprefix("torch.")
        trainer.log.say(
            f"{size:,} parameters, {engine.world_size} ranks, ZeRO {engine.stage}, {precision}"
            + (f", going on from {start}" if start else "")
        )
        for name, objective in parts.model.objectives.items():
            for note in objective.notes:
                trainer.log.say(f"note: {name}: {note}")
        for note in trainer.weighing.notes:
            trainer.log.say(f"note: weigher: {note}")
        idle = trainer.finished
        for spans in parts.annotations(parts.store).values() if engine.rank == 0 else ():
            if isinstance(spans, LiveSpans):
                trainer.log.say(f"note: learned masking: {spans.note}")
        trainer.train()
        if trainer.stopping and not trainer.finished:
            trainer.log.say(f"stopped on request after step {trainer.step}; the same command goes on from there")
        elif trainer.step > recipe.training.steps:
            trainer.log.say(f"nothing to do: the run has {trainer.step} steps already (training.steps)")
        elif trainer.early.exhausted:
            trainer.log.say(("nothing to do: " if idle else "") + trainer.early.verdict(trainer.step))
        elif trainer.skipped:
            trainer.log.say(f"done; {trainer.skipped} steps were skipped because their loss or gradient was not finite")
        else:
            trainer.log.say("done")
    finally:
        trainer.log.close()
    engine.close()


@contextmanager
def _own_folder(recipe: Recipe) -> Iterator[None]:
    """Make the run's folder and hold its lock, of which the system lets go however the process ends.

    Raises:
        UserError: if it cannot be written, or another training holds it.
    """
    run = Path(recipe.run)
    with recipe.named_in_errors():
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = open(run / ".lock", "w")
            _lock(lock)
        except BlockingIOError:
            raise UserError(
                f"run: another training is writing to '{run}'; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(f"run: cannot write to '{run}': {error.strerror}") from None
    with lock:
        yield


def _lock(file: TextIO) -> None:
    """Lock a file, unless its file system knows no locks: then nothing tells that this training writes there.

    Raises:
        BlockingIOError: if another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def share_cores() -> None:
    """Divide the cores among the ranks of this machine, unless the user has."""
    if device_type() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", 1)
        )
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
