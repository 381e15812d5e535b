"""The file of results: one line a metric, appended and never changed, with what is needed to read it years later."""

import csv
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain.errors import UserError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "liger": "liger-kernel",
    "cut-cross-entropy": "cut-cross-entropy",
    "opacus": "opacus",
}
TIME, GRAPH, PEAK, BANDWIDTH, RATE, FLOOR = "time_ms", "graph_ms", "peak_mib", "gb_s", "tflop_s", "floor_fraction"


class Record(NamedTuple):
    """One metric of one provider; 20th, 50th and 80th percentile, or only the 50th where there is but one value."""

    op: str
    provider: str
    mode: str
    shape: str
    dtype: str
    metric: str
    p20: float | None
    p50: float
    p80: float | None


class Run(NamedTuple):
    """On what, with what, when and how a run was made; the last columns of the file."""

    gpu: str
    """Name of the GPU, or ``CPU: …``."""
    driver: str
    versions: str
    commit: str
    """With a + if files of the checkout were changed."""
    date: str
    quick: str
    """``yes`` for few repetitions, else ``no``."""


COLUMNS = (*Record._fields, *Run._fields)


def this_run(device: str, quick: bool) -> Run:
    """Return the facts of this machine and checkout, now."""
    versions = []
    for name, package in PACKAGES.items():
        try:
            versions.append(f"{name}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name}=none")
    revision = _output("git", "-C", str(HERE), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else ""
    return Run(
        torch.cuda.get_device_name() if device == "cuda" else f"CPU: {_cpu()}, threads={torch.get_num_threads()}",
        driver.split("\n")[0],
        " ".join(versions),
        revision + "+" * bool(changed),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "yes" if quick else "no",
    )


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def default_file(device: str) -> Path:
    """Return ``results/<device>.csv``."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"


def start(path: Path) -> None:
    """Make the file, with its folder, if there is none.

    Raises:
        UserError: if it cannot be written, or holds something else.
    """
    try:
        if path.is_file() and path.stat().st_size:
            read(path)
            path.open("a").close()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _add(path, [COLUMNS])
    except OSError as error:
        raise _unwritable(path, error) from None


def append(path: Path, records: Iterable[Record], run: Run) -> None:
    """Add records to a file that was started.

    Raises:
        UserError: if it cannot be written any more.
    """
    try:
        _add(path, ([*map(_cell, record), *run] for record in records))
    except OSError as error:
        raise _unwritable(path, error) from None


def _cell(value: str | float | None) -> str | None:
    return f"{value:.6g}" if isinstance(value, float) else value


def _add(path: Path, rows: Iterable[Iterable]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = "its folder is none" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return UserError(f"cannot add results to {path}: {reason}; --csv names another file")


def read(path: Path) -> list[tuple[Record, Run]]:
    """Read a file of results.

    Raises:
        UserError: if it is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = list(csv.reader(file)) or [[]]
    except OSError as error:
        raise UserError(f"cannot read results from {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is no file of results: it is not text") from None
    if tuple(names) != COLUMNS:
        raise UserError(f"{path} is no file of results: its columns are not {', '.join(COLUMNS)}")
    return [_parsed(row) for row in rows]


def _parsed(row: list[str]) -> tuple[Record, Run]:
    of_record, of_run = row[: len(Record._fields)], row[len(Record._fields) :]
    *names, low, middle, high = of_record
    quantiles = (float(value) if value else None for value in (low, middle, high))
    return Record(*names, *quantiles), Run(*of_run)


def last_runs(rows: Iterable[tuple[Record, Run]]) -> dict[str, tuple[Run, list[Record]]]:
    """Return for every op its last run that was not quick, and what it measured."""
    found: dict[str, dict[Run, list[Record]]] = {}
    for record, run in rows:
        if run.quick == "no":
            found.setdefault(record.op, {}).setdefault(run, []).append(record)
    return {op: max(runs.items(), key=lambda item: item[0].date) for op, runs in found.items()}
