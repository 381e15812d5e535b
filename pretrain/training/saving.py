"""What a checkpoint holds of a run besides the engine's states, and how all ranks write it together."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pretrain.data.output import sync
from pretrain.errors import RunError
from pretrain.training import checkpoint
from pretrain.training.ending import is_lost_contact

if TYPE_CHECKING:
    from pretrain.training.trainer import Trainer

STATE, ENGINE = "trainer.json", "engine"


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
        written = engine.save(partial / ENGINE)
        own = {}
        if written:
            sync(written)  # by the machine that has written it
            own[str(written.relative_to(partial))] = checkpoint.describe(written)
        described = dict(entry for each in engine.gather(own) for entry in each.items())
        if engine.rank == 0:
            _check_all_wrote(partial / ENGINE, 1 if engine.stage == 0 else engine.world_size)
            _write_facts(trainer, partial)
            facts = {"world_size": engine.world_size, "zero_stage": engine.stage}
            trainer.log.say(f"saved {checkpoint.publish(run, step, facts, described)}")
            mark_best(trainer)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_contact(error):
            raise
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


def mark_best(trainer: "Trainer") -> None:
    """Name the checkpoint that scored best on dev, if the run is scored."""
    if trainer.early:
        checkpoint.mark_best(trainer.run, trainer.early.best_step)


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
