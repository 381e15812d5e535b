"""What the benchmarks share: the store they run on, the facts of the machine, the table, the file of results."""

import importlib.metadata
import json
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from pretrain.data.embedded import write_corpus
from pretrain.data.prepare import prepare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CORPUS_MEGABYTES = 16
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")


def environment() -> dict:
    """Return when and on what a benchmark ran: date (UTC), versions, CPU, cores, torch's threads, load, GPU."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def now() -> float:
    """Return seconds: of the clock behind a GPU, of CPU time without one, which other processes disturb less."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def default_store(sequence: int, vocabulary: int) -> Path:
    """Return a corpus prepared from the embedded text, with samples of up to ``sequence`` tokens; made at first use."""
    folder = ROOT / "runs" / "benchmarks" / f"embedded-{sequence}-{vocabulary}"
    if not folder.is_dir():
        text = folder.with_name("embedded-text")
        if not text.is_dir():
            write_corpus(text, CORPUS_MEGABYTES)
        prepare([text / "corpus.jsonl"], folder, max_length=sequence, vocabulary=vocabulary)
    return folder


def print_table(rows: list[dict]) -> None:
    """Print rows that have the same keys, as a Markdown table with aligned columns."""
    lines = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for number, line in enumerate(lines):
        cells = (
            text.ljust(width) if column == 0 or number < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("| " + " | ".join(cells) + " |")


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def append_result(name: str, run: dict) -> Path:
    """Add a run to ``benchmarks/results/<name>.json``, a JSON list with the oldest first; return the file."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*runs, run], indent=1) + "\n")
    return path
