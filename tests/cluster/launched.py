"""Runs of two ranks under ``medley launch``, in processes of their own."""

import os
import subprocess
import sys
import threading
import time
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


class Launched:
    """A run in processes of its own, and what it has printed so far: when each line came, and the line."""

    def __init__(self, document: dict, *arguments: str, restarts: int = 0, **variables: str):
        path = Path(document["run"]).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        launch = [sys.executable, "-m", "pretrain.cli", "launch", "--ranks", "2", "--restarts", str(restarts)]
        train = ["--ds_config", str(DS / "cpu.json"), "--config", str(path), "--timeout", str(TIMEOUT_SECONDS)]
        self.process = subprocess.Popen(
            [*launch, "--script", str(FAULTY), "--", *train, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.time(), line))

    def finish(self) -> tuple[int, str]:
        """Wait for the end, or end it if it takes too long; return the exit code and the output."""
        try:
            self.process.wait(LIMIT_SECONDS)
        finally:
            self.process.kill()
            self._reader.join(LIMIT_SECONDS)
        return self.process.returncode, "".join(line for _, line in self.lines)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return rank → process of the ranks that live."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return found
