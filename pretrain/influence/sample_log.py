"""What some steps measured of their samples: ``influence.jsonl`` in the run's folder, read by ``medley influence``."""

import json
import math
import sys
from pathlib import Path

import numpy as np

FILE = "influence.jsonl"
MOST_RECORDS, MOST_SAMPLES = 1000, 512  # of a run, of a record: together some 30 MB


class SampleLog:
    """Writes a record of a step now and then; of a large batch evenly spaced samples.

    Args:
        run: the run's folder.
        steps: of the run.
        interval_steps: steps between records; more where there would be too many records.
    """

    def __init__(self, run: Path, steps: int, interval_steps: int):
        self.path, self.interval = run / FILE, max(interval_steps, math.ceil(steps / MOST_RECORDS))
        self._cut = False

    def is_due(self, step: int) -> bool:
        """Whether ``step`` (0-based) is to be recorded."""
        return (step + 1) % self.interval == 0

    def write(self, step: int, about: dict, samples: dict[str, np.ndarray]) -> None:
        """Write what is told ``about`` a step and, for each of its ``samples``, arrays of the same length.

        The first record of this process replaces those of the same and later steps, which an earlier attempt left.
        """
        if not self._cut:
            self._cut_back(step)
        number = len(next(iter(samples.values())))
        chosen = np.unique(np.linspace(0, number - 1, min(number, MOST_SAMPLES)).round().astype(int))
        columns = {name: [_short(each) for each in values[chosen].tolist()] for name, values in samples.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, **about, **columns}, allow_nan=False) + "\n")

    def _cut_back(self, step: int) -> None:
        self._cut = True
        if self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in read_sample_log(self.path.parent) if record["step"] <= step]
            temporary = self.path.with_suffix(".new")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self.path)


def read_sample_log(run: Path) -> list[dict]:
    """Return the records of a run, oldest first; a line that a crash cut short is left out."""
    records, path = [], run / FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            int(record["step"])
            records.append(record)
        except (ValueError, TypeError, KeyError):
            print(f"warning: {path}: passing over a broken line", file=sys.stderr)
    return records


def _short(number: float) -> float | int | None:
    """Return a number with the digits that mean something; null where it is not finite, which JSON does not know."""
    if not math.isfinite(number):
        return None
    return int(number) if number == int(number) else float(f"{number:.6g}")
