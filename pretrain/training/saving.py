"""What a checkpoint holds of a run besides the engine's states, and how all ranks write and read it together."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pretrain.errors import RunError, UserError
from pretrain.training import checkpoint

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

STATE = "trainer.json"


def save(trainer: "Trainer") -> None:
    """Write a checkpoint of the trainer; all ranks call it.

    Raises:
        RunError: if it cannot be written (a full disk, say); earlier checkpoints stay.
    """
    engine, run, step = trainer.engine, trainer.run, trainer.step
    partial = checkpoint.partial_folder(run, step)
    try:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save(partial / "engine")
        if engine.rank == 0:
            _check_all_wrote(partial / "engine", 1 if engine.stage == 0 else engine.world_size)
            _write_facts(trainer, partial)
            facts = {"world_size": engine.world_size, "zero_stage": engine.stage}
            trainer.log.say(f"saved {checkpoint.publish(run, step, facts)}")
            _mark_best(trainer)
    except (OSError, RuntimeError, SafetensorError) as error:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"step {step}: cannot save a checkpoint: {reason}; last good one: {last_checkpoint(run)}"
        ) from error
    if engine.rank == 0:
        try:
            checkpoint.prune(run, trainer.recipe.checkpoint.keep)
        except OSError as error:
            trainer.log.say(f"warning: cannot remove an old checkpoint: {error}")
    engine.barrier()


def resume(trainer: "Trainer", folder: Path) -> None:
    """Take up a checkpoint that :func:`pretrain.training.checkpoint.verify` has passed; all ranks call it.

    Raises:
        UserError: if it was saved on another world size or ZeRO stage, or with other data.
    """
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    for key, now in (("world_size", trainer.engine.world_size), ("zero_stage", trainer.engine.stage)):
        if manifest[key] != now:
            raise UserError(
                f"{folder}: saved with {key} {manifest[key]}, this run has {now}; "
                f"resuming on another {key.replace('_', ' ')} is not supported yet"
            )
    trainer.load_state_dict(json.loads((folder / STATE).read_text()))
    trainer.engine.load(folder / "engine")
    if trainer.engine.rank == 0:
        checkpoint.set_aside(trainer.run, after=trainer.step)
        _mark_best(trainer)


def _mark_best(trainer: "Trainer") -> None:
    if trainer.early:
        checkpoint.mark_best(trainer.run, trainer.early.best_step)


def check_agreement(trainer: "Trainer") -> None:
    """Raise RunError if the ranks do not go on from the same step; all ranks call it."""
    newest, minus_oldest = trainer.engine.all_reduce([trainer.step, -trainer.step], "max").tolist()
    if newest != -minus_oldest:
        raise RunError(
            f"{trainer.run}: the ranks see different checkpoints (steps {-minus_oldest:.0f} to {newest:.0f}); "
            "the run's folder must be one that all of them share"
        )


def last_checkpoint(run: Path) -> str:
    """Return the newest checkpoint's folder for a message, or "none"."""
    return str(next(iter(checkpoint.candidates(run)), "none"))


def _check_all_wrote(folder: Path, expected: int) -> None:
    """Raise OSError unless the folder holds what every rank has written."""
    found = len(list(folder.iterdir()))
    if found != expected:
        raise OSError(f"{folder} holds {found} files of {expected}; the run's folder must be one that all ranks share")


def _write_facts(trainer: "Trainer", folder: Path) -> None:
    (folder / STATE).write_text(json.dumps(trainer.state_dict(), indent=2) + "\n")
    trainer.recipe.save(folder / "config.yaml")
    trainer.model.encoder.config.save_pretrained(folder / "model")
    trainer.parts.tokenizer.save_pretrained(folder / "model")
