"""Which checkpoint a run goes on from, what must be as it was, and how all ranks take it up."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import RunError, UserError
from pretrain.influence import WeigherConfig
from pretrain.recipe import Recipe, load_recipe
from pretrain.training import checkpoint
from pretrain.training.saving import ENGINE, STATE, mark_best
from pretrain.training.start import RESTART

if TYPE_CHECKING:
    from pretrain.training.engine import Engine
    from pretrain.training.trainer import Trainer


def starting_point(recipe: Recipe, resume: str, own_keys: tuple[str, ...] = ()) -> Path | None:
    """Return the checkpoint to go on from, or None for a new run; say what is not as it was then.

    It is looked over only: the ranks, once they are joined, read its files together (:func:`agree_on_start`).

    Args:
        resume: ``auto`` takes the newest good checkpoint of the run's folder, ``never`` none, else a checkpoint. A run
            that was started anew goes on with ``auto``, whatever it began with.
        own_keys: sections of the recipe, beside those of every run, that must be as they were.

    Raises:
        UserError: if there is none to be had, or it is of another model, other objectives, another sampler, ….
    """
    run = Path(recipe.run)
    if _goes_by_itself(resume):
        start = _newest(run)
    elif resume == "never":
        if checkpoint.candidates(run):
            raise UserError(
                f"{run}: has checkpoints, which --resume never would overwrite; choose another run folder (run=…)"
            )
        return None
    else:
        start = Path(resume)
        checkpoint.look_over(start)
    if start is not None:
        _compare_recipes(recipe, start, own_keys)
    return start


def agree_on_start(trainer: "Trainer", start: Path | None, resume: str, own_keys: tuple[str, ...]) -> Path | None:
    """Return the checkpoint to go on from once its files are found as they were saved: ``start``, or if the run takes
    the newest and something is wrong with that, an older one. Each rank reads its part of the files; all call it.

    Raises:
        UserError: if something is wrong with a checkpoint that was named, or none is left.
        RunError: if the ranks see different checkpoints.
    """
    engine, run = trainer.engine, trainer.run
    engine.progress.expect_long()
    while True:
        seen, wrongs = zip(*engine.gather(_read_own_part(engine, start)), strict=True)
        if len(set(seen)) > 1:
            raise RunError(
                f"{run}: the ranks see different checkpoints ({'; '.join(sorted(set(seen)))}); the run's folder must "
                "be one that all of them share"
            )
        wrong = next((each for each in wrongs if each), None)
        if start is None or wrong is None:
            return start
        if not _goes_by_itself(resume):
            raise UserError(wrong)
        _say(f"{checkpoint.PASSING_OVER}: {wrong}")
        start = _newest(run, before=start)
        _compare_recipes(trainer.recipe, start, own_keys)


def _goes_by_itself(resume: str) -> bool:
    """Whether the run takes its newest checkpoint: so says the user, or it is started anew."""
    return resume == "auto" or int(os.environ.get(RESTART, 0)) > 0


def _newest(run: Path, before: Path | None = None) -> Path | None:
    """Return the run's newest checkpoint, looked over, or None if it has none; raise UserError if none is good."""
    found = checkpoint.newest(run, _say, checkpoint.look_over, before)
    if found is None and (before or checkpoint.candidates(run)):
        raise UserError(f"{run}: none of its checkpoints verifies; choose another run folder (run=…) to start anew")
    return found


def _read_own_part(engine: "Engine", start: Path | None) -> tuple[str, str | None]:
    """Read this rank's part of a checkpoint's files; return which checkpoint it is and, if so, in which way a file is
    not what was saved.

    The states come first, in the order of ranks: each rank reads what it takes up if there are as many as there were.
    """
    if start is None:
        return "none", None
    listed = (start / checkpoint.MANIFEST).read_bytes()
    which, files = f"{start.name}, {hashlib.sha256(listed).hexdigest()[:8]}", json.loads(listed)["files"]
    in_order = sorted(files, key=lambda name: (not name.startswith(f"{ENGINE}/"), name))
    try:
        for name in in_order[engine.rank :: engine.world_size]:
            engine.progress.call()
            checkpoint.compare(start, {name: files[name]})
    except UserError as error:
        return which, str(error)
    return which, None


def _compare_recipes(recipe: Recipe, start: Path, own_keys: tuple[str, ...]) -> None:
    """Say what of the recipe is not as it was in a checkpoint; raise UserError if it has to be."""
    saved = load_recipe(start / "config.yaml", kind=type(recipe))
    _check_same(recipe, saved, start, own_keys)
    for line in _changes(recipe, saved):
        _say(line)


def _check_same(recipe: Recipe, saved: Recipe, start: Path, own_keys: tuple[str, ...]) -> None:
    """Refuse to go on with another model, other objectives or another optimizer than the checkpoint's."""
    for key, now, then in (
        ("seed", recipe.seed, saved.seed),
        ("model", _architecture(recipe), _architecture(saved)),
        ("objectives", list(recipe.objective_configs.items()), list(saved.objective_configs.items())),
        ("sampler", recipe.sampler_config, saved.sampler_config),
        ("weigher", _numbers_of(recipe.weigher_config), _numbers_of(saved.weigher_config)),
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


def _numbers_of(weigher: WeigherConfig) -> dict:
    """Return what of a weigher's configuration decides its weights, and not only how they are come by."""
    return weigher.model_dump(exclude={"gradient"})


def _architecture(recipe: Recipe) -> dict:
    """Return what of the model's configuration decides its numbers, and not only how they are computed."""
    return recipe.model.model_dump(exclude={"attention", "activation_checkpointing"})


def _say(line: str) -> None:
    """Print a line, from one of the ranks, which may not be joined yet."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


def resume(trainer: "Trainer", folder: Path) -> None:
    """Take up the checkpoint that the ranks have agreed on; all ranks call it.

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
    engine.load(folder / ENGINE)
    if trainer.engine.rank == 0:
        checkpoint.set_aside(trainer.run, after=trainer.step)
        mark_best(trainer)
