"""launch/train.py with something that goes wrong: ``MEDLEY_FAULT=KIND:RANK:STEP`` in the environment, once a run.

The fault happens in one rank, before it takes the batch of a step. What has happened is noted in the run's folder, so
that a run that is started again goes on.
"""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

from pretrain.training.run import main
from pretrain.training.trainer import Trainer


def hang(trainer: Trainer) -> None:
    threading.Event().wait()


def spin(trainer: Trainer) -> None:
    while True:
        pass


def freeze(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def vanish(trainer: Trainer) -> None:
    trainer.engine.save = lambda folder: die(trainer)


def lag(trainer: Trainer) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 10:
        pass


def crash(trainer: Trainer) -> None:
    raise ZeroDivisionError("a defect")


def full(trainer: Trainer) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


def fill(trainer: Trainer) -> None:
    with open(trainer.run.parent / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(1 << 12)):
            pass


def readonly(trainer: Trainer) -> None:
    folder = trainer.run / "checkpoints"
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def truncate(trainer: Trainer) -> None:
    for file in trainer.parts.store.folder.glob("tokens*"):
        os.truncate(file, 0)


FAULTS = {each.__name__: each for each in (hang, spin, freeze, die, vanish, lag, crash, full, fill, readonly, truncate)}


def inject(kind: str, rank: int, step: int) -> None:
    """Have a rank meet a fault before a step."""
    train_step = Trainer.train_step

    def faulty(trainer: Trainer) -> dict:
        mark = trainer.run / f"fault-{kind}"
        if trainer.engine.rank == rank and trainer.step == step and not mark.exists():
            mark.touch()
            FAULTS[kind](trainer)
        return train_step(trainer)

    Trainer.train_step = faulty


if __name__ == "__main__":
    if fault := os.environ.get("MEDLEY_FAULT"):
        kind, rank, step = fault.split(":")
        inject(kind, int(rank), int(step))
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
