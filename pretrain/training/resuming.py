"""Which checkpoint a run goes on from, what must be as it was, and how all ranks take it up."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import RunError, UserError
from pretrain.recipe import Recipe, load_recipe
from pretrain.training import checkpoint
from pretrain.training.saving import STATE, mark_best
from pretrain.training.start import RESTART

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer


def starting_point(recipe: Recipe, resume: str, own_keys: tuple[str, ...] = ()) -> Path | None:
    """Return the verified checkpoint to go on from, or None for a new run; say what is not as it was then.

    Args:
        resume: ``auto`` takes the newest good checkpoint of the run's folder, ``never`` none, else a checkpoint. A run
            that was started anew goes on with ``auto``, whatever it began with.
        own_keys: sections of the recipe, beside those of every run, that must be as they were.

    Raises:
        UserError: if there is none to be had, or it is of another model, other objectives, another sampler, ….
    """
    run = Path(recipe.run)
    if int(os.environ.get(RESTART, 0)) > 0:
        resume = "auto"
    if resume == "auto":
        start = checkpoint.newest(run, warn=_say)
        if start is None and checkpoint.candidates(run):
            raise UserError(f"{run}: none of its checkpoints verifies; choose another run folder (run=…) to start anew")
    elif resume == "never":
        if checkpoint.candidates(run):
            raise UserError(
                f"{run}: has checkpoints, which --resume never would overwrite; choose another run folder (run=…)"
            )
        return None
    else:
        start = Path(resume)
        checkpoint.verify(start)
    if start is not None:
        saved = load_recipe(start / "config.yaml", kind=type(recipe))
        _check_same(recipe, saved, start, own_keys)
        for line in _changes(recipe, saved):
            _say(line)
    return start


def _check_same(recipe: Recipe, saved: Recipe, start: Path, own_keys: tuple[str, ...]) -> None:
    """Refuse to go on with another model, other objectives or another optimizer than the checkpoint's."""
    for key, now, then in (
        ("seed", recipe.seed, saved.seed),
        ("model", _architecture(recipe), _architecture(saved)),
        ("objectives", list(recipe.objective_configs.items()), list(saved.objective_configs.items())),
        ("sampler", recipe.sampler_config, saved.sampler_config),
        ("weigher", recipe.weigher_config, saved.weigher_config),
        ("training.optimizer.name", recipe.training.optimizer.name, saved.training.optimizer.name),
        *((key, getattr(recipe, key), getattr(saved, key)) for key in own_keys),
    ):
        if now != then:
            raise UserError(f"{key}: differs from that of {start}; choose another run folder (run=…) or restore it")


def _changes(recipe: Recipe, saved: Recipe) -> Iterator[str]:
    """Say what of ``training`` is not as it was."""
    now, then = recipe.training.model_dump(), saved.training.model_dump()
    changed = [key for key in now if now[key] != then[key]]
    if changed:
        yield "note: " + ", ".join(f"training.{key} is {now[key]} (was {then[key]})" for key in changed)
    if "batch_rows" in changed:
        yield (
            "warning: another global batch: samples keep their order but fall into other steps; the learning rate, its "
            "schedule and all else that follows the steps stay as they are"
        )


def _architecture(recipe: Recipe) -> dict:
    """Return what of the model's configuration decides its numbers, and not only how they are computed."""
    return recipe.model.model_dump(exclude={"attention", "activation_checkpointing"})


def _say(line: str) -> None:
    """Print a line, from one of the ranks, which are not joined yet."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


def resume(trainer: "Trainer", folder: Path) -> None:
    """Take up a checkpoint that :func:`pretrain.training.checkpoint.verify` has passed; all ranks call it.

    The world size and the ZeRO stage may be others than those it was saved on. Weights, optimizer states, samples,
    masks and the sampler's draws are then still the same; the sums over ranks, and dropout, are not.

    Raises:
        UserError: if it was saved with other data.
    """
    engine, manifest = trainer.engine, json.loads((folder / checkpoint.MANIFEST).read_text())
    if (manifest["world_size"], manifest["zero_stage"]) != (engine.world_size, engine.stage):
        before = f"{manifest['world_size']} ranks at ZeRO {manifest['zero_stage']}"
        _say(f"note: {folder} was saved on {before}, and is taken over by {engine.world_size} at {engine.stage}")
    trainer.load_state_dict(json.loads((folder / STATE).read_text()))
    engine.load(folder / "engine")
    if trainer.engine.rank == 0:
        checkpoint.set_aside(trainer.run, after=trainer.step)
        mark_best(trainer)


def check_agreement(trainer: "Trainer") -> None:
    """Raise RunError if the ranks do not go on from the same step; all ranks call it."""
    newest, minus_oldest = trainer.engine.all_reduce([trainer.step, -trainer.step], "max").tolist()
    if newest != -minus_oldest:
        raise RunError(
            f"{trainer.run}: the ranks see different checkpoints (steps {-minus_oldest:.0f} to {newest:.0f}); "
            "the run's folder must be one that all of them share"
        )
