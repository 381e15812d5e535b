"""Runs of two ranks under ``medley launch``, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from tests.training.runs import DS

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).with_name("faulty.py")
TIMEOUT_SECONDS = 15
"""Of the runs: what stands still for so long hangs. A machine that is busy needs seconds to give a rank its turn."""
LIMIT_SECONDS = 900
"""For a whole run, on a busy machine."""


def command(document: dict, *arguments: str, restarts: int = 0) -> list[str]:
    """Write a recipe and return the command that trains it."""
    path = Path(document["run"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    launcher = [sys.executable, "-m", "pretrain.cli", "launch", "--ranks", "2", "--restarts", str(restarts)]
    train = ["--ds_config", str(DS / "cpu.json"), "--config", str(path), "--timeout", str(TIMEOUT_SECONDS)]
    return [*launcher, "--script", str(FAULTY), "--", *train, *arguments]


def start(document: dict, *arguments: str, restarts: int = 0, **variables: str) -> subprocess.Popen:
    """Start a run; its output comes through one pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    return subprocess.Popen(
        command(document, *arguments, restarts=restarts),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen) -> str:
    """Return a run's output once it has ended; end it if it takes too long."""
    try:
        return process.communicate(timeout=LIMIT_SECONDS)[0]
    finally:
        process.kill()


def rank_processes(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return rank → process of the ranks that live."""
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found
