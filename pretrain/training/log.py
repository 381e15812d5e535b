"""What a run tells: one JSON line a step, TensorBoard, other trackers, and a status line for people."""

import importlib.util
import json
import math
import re
import sys
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pretrain.errors import UserError

METRICS, HELDOUT_START = "metrics.jsonl", "heldout-start.json"

# Dense bf16 peaks of one device in TFLOP/s, from the makers' data sheets; matched as a word of its name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A6000": 155.0, "L4": 121.0}


def peak_flops(device_name: str) -> float | None:
    """Return a known GPU's peak in FLOP/s, else None."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


class RunLog:
    """Writes the records of a run; on ranks other than 0 it does nothing.

    Args:
        run: the run's folder.
        first_step: steps already done; later lines of an earlier attempt are cut off, as they are about to be repeated.
        steps: steps in all.
        interval_steps: steps between status lines.
        trackers: "wandb", "trackio".
        settings: what the trackers are told of the run.
    """

    def __init__(
        self, run: Path, *, first_step: int, steps: int, interval_steps: int, trackers: list[str], settings: dict
    ):
        self.steps, self.interval_steps = steps, interval_steps
        self._metrics_path = run / METRICS
        _keep_steps(self._metrics_path, first_step)
        self._metrics = open(self._metrics_path, "a", encoding="utf-8")
        self._board = SummaryWriter(str(run), purge_step=first_step + 1)
        self._trackers = [start_tracker(name, run, settings) for name in trackers]
        self._since, self._tokens, self._seconds = first_step, 0, 0.0
        self._began = time.monotonic()

    def step(self, record: dict) -> None:
        """Take up the record of one step (the fields are in docs/formats.md)."""
        self._metrics.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        self._metrics.flush()
        numbers = dict(_numbers(record))
        for name, value in numbers.items():
            self._board.add_scalar(name, value, record["step"])
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])
        self._tokens += record["tokens"]
        self._seconds += record["seconds"]
        if record["step"] % self.interval_steps == 0 or record["step"] == self.steps:
            self.say(self._status(record))
            self._since, self._tokens, self._seconds = record["step"], 0, 0.0

    def say(self, line: str) -> None:
        """Print a line for people."""
        print(line, flush=True)

    def close(self) -> None:
        """Flush and close everything."""
        self._metrics.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.finish()

    def _status(self, record: dict) -> str:
        speed = self._tokens / max(self._seconds, 1e-9)
        left = (self.steps - record["step"]) * self._seconds / max(1, record["step"] - self._since)
        parts = [
            f"step {record['step']}/{self.steps}",
            f"loss {record['loss']:.4f}",
            " ".join(f"{name} {value:.4f}" for name, value in record["losses"].items()),
            f"lr {record['lr']:.2e}",
            f"norm {record['grad_norm']:.2f}" if record["grad_norm"] is not None else "skipped: not finite",
            f"{speed:,.0f} tokens/s",
            f"eta {_duration(left)}",
        ]
        if record.get("mfu") is not None:
            parts.append(f"mfu {record['mfu']:.1%}")
        if record.get("heldout"):
            parts.append("held-out " + " ".join(f"{name} {value:.4f}" for name, value in record["heldout"].items()))
        return " | ".join(parts)


class SilentLog:
    """The log of the ranks that do not tell."""

    def step(self, record: dict) -> None:
        """Ignore a record."""

    def say(self, line: str) -> None:
        """Ignore a line."""

    def close(self) -> None:
        """Nothing is open."""


def start_tracker(name: str, run: Path, settings: dict):
    """Start a run of W&B or trackio and return it."""
    return importlib.import_module(name).init(project="medley", name=run.name, config=settings)


def check_trackers(names: list[str]) -> None:
    """Raise :class:`UserError` for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: '{name}' is not installed; pip install {name}")


def read_metrics(run: Path) -> list[dict]:
    """Return the records of a run, oldest first; a line that a crash cut short is left out."""
    records = []
    path = run / METRICS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            int(record["step"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            print(f"warning: {path}: passing over a broken line", file=sys.stderr)
    return records


def _keep_steps(path: Path, last: int) -> None:
    """Cut a metrics file back to the steps up to ``last``."""
    if path.is_file():
        kept = [json.dumps(record) + "\n" for record in read_metrics(path.parent) if record["step"] <= last]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def _strict(value):
    """Return a record with null for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(record: dict, prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield prefix + key, value


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
