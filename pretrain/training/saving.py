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
            _write_facts(trainer, partial)
            facts = {"world_size": engine.world_size, "zero_stage": engine.stage}
            trainer.log.say(f"saved {checkpoint.publish(run, step, facts)}")
            checkpoint.prune(run, trainer.recipe.checkpoint.keep)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"step {step}: cannot save a checkpoint: {reason}; last good one: {last_checkpoint(run)}"
        ) from error
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


def last_checkpoint(run: Path) -> str:
    """Return the newest checkpoint's folder for a message, or "none"."""
    return str(next(iter(checkpoint.candidates(run)), "none"))


def _write_facts(trainer: "Trainer", folder: Path) -> None:
    (folder / STATE).write_text(json.dumps(trainer.state_dict(), indent=2) + "\n")
    trainer.recipe.save(folder / "config.yaml")
    trainer.model.encoder.config.save_pretrained(folder / "model")
    trainer.parts.tokenizer.save_pretrained(folder / "model")
