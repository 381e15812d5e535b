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

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = {"torch": "torch", "triton": "triton", "transformers": "transformers", "liger": "liger-kernel"}
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


class Machine(NamedTuple):
    """On what, with what and when a run was made; the last columns of the file."""

    gpu: str
    """Name of the GPU, or ``CPU: …``."""
    driver: str
    versions: str
    commit: str
    """With a + if files of the checkout were changed."""
    date: str


COLUMNS = (*Record._fields, *Machine._fields)


def machine(device: str) -> Machine:
    """Return the facts of this machine and checkout."""
    versions = []
    for name, package in PACKAGES.items():
        try:
            versions.append(f"{name}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name}=none")
    revision = _output("git", "-C", str(HERE), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(HERE), "status", "--porcelain", "--untracked-files=no")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else ""
    return Machine(
        torch.cuda.get_device_name() if device == "cuda" else f"CPU: {_cpu()}, threads={torch.get_num_threads()}",
        driver.split("\n")[0],
        " ".join(versions),
        revision + "+" * bool(changed),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
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


def check_file(path: Path) -> None:
    """Raise ``ValueError`` if a file is there that has other columns."""
    if path.is_file() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                raise ValueError(f"{path} is no file of results: its columns are not {', '.join(COLUMNS)}")


def append(path: Path, records: Iterable[Record], where: Machine) -> None:
    """Add records to a CSV file, which is made at first use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file() or not path.stat().st_size
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(
            [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in (*record, *where)] for record in records
        )
