"""Opening, resuming and memory of a rank, for stores of 10⁶ to 10⁹ tokens in one shard and in many.

Each figure is of a process of its own: it opens the store, goes to a position and makes the batch there. The tokens are
holes in sparse files, so that the figures are of what Medley and the kernel do and not of a disk.

    python -m benchmarks.store
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.common import append_result, environment, print_table
from pretrain.data.loader import Loader
from pretrain.data.store import FORMAT_VERSION, Store
from pretrain.data.store_writer import write_index

LENGTH = 85  # tokens of a sample
LOADER = {"seed": 0, "row_length": 512, "batch_rows": 43, "micro_batch_rows": 43}  # about 256 samples
POSITIONS = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of an epoch


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Opening, resuming and memory of large stores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=float, nargs="+", default=[1e6, 1e8, 1e9], metavar="N", help="in a store")
    add("--shards", type=int, nargs="+", default=[1, 64], metavar="N", help="of a store")
    add("--steps", type=int, default=200, metavar="N", help="batches that memory is measured over")
    add("--rounds", type=int, default=5, metavar="N", help="processes for each figure; medians are reported")
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/store.json."""
    args = parser().parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in args.tokens:
            for shards in args.shards:
                store = Path(folder) / f"{tokens:.0f}-{shards}"
                synthesise(store, int(tokens), shards, LENGTH)
                rows.append({"M tokens": tokens / 1e6, "shards": shards, **measure(store, args.steps, args.rounds)})
    print_table(rows)
    setup = {"steps": args.steps, "rounds": args.rounds, "sample": LENGTH, **LOADER}
    print(f"added to {append_result('store', {**environment(), 'setup': setup, 'stores': rows})}")


def synthesise(folder: Path, tokens: int, shards: int, length: int) -> None:
    """Write a store of samples of ``length`` tokens, about ``tokens`` in all, that are holes: zeros that take no room.
    The hashes of the shards are not known."""
    folder.mkdir()
    samples = tokens // length
    offsets = np.arange(samples, dtype="<i8") * length
    rows = folder / "rows"
    np.stack([offsets, np.full(samples, length, "<i8")], axis=1).tofile(rows)
    with open(rows, "rb") as opened:
        index = write_index(folder, samples, opened)
    rows.unlink()
    entries = []
    for number, part in enumerate(np.diff(np.linspace(0, samples, shards + 1).astype(int)).tolist()):
        file = folder / f"tokens-{number:05d}.bin"
        file.touch()
        os.truncate(file, 2 * part * length)
        entries.append({"file": file.name, "bytes": 2 * part * length, "sha256": None})
    meta = {"format_version": FORMAT_VERSION, "dtype": "<u2", "samples": samples, "tokens": samples * length}
    meta |= {"max_length": length, "fingerprint": folder.name, "shards": entries, "index": index}
    (folder / "meta.json").write_text(json.dumps(meta))


def measure(store: Path, steps: int, rounds: int) -> dict[str, float]:
    """Return the medians over ``rounds`` processes."""
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = [pool.apply(_measure_once, (store, steps)) for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def _measure_once(folder: Path, steps: int) -> dict[str, float]:
    """Return milliseconds of opening and of the first batch at each position, and MiB that the process grew by:
    its own, and of mapped files."""
    _first_batch(Store(folder), 0)  # so that code and allocator are warm
    own, mapped = _resident()
    began = time.perf_counter()
    store = Store(folder)
    times = {"open, ms": 1e3 * (time.perf_counter() - began)}
    last = len(store) // Loader(store, **LOADER).window_size - 1
    for name, position in POSITIONS.items():
        began = time.perf_counter()
        loader = _first_batch(store, round(position * last))
        times[f"first batch at the {name}, ms"] = 1e3 * (time.perf_counter() - began)
    for _ in range(steps):
        loader.next()
    own_then, mapped_then = _resident()
    return {**times, "own MiB": own_then - own, "mapped MiB": mapped_then - mapped}


def _first_batch(store: Store, window: int) -> Loader:
    loader = Loader(store, **LOADER)
    state = loader.state_dict()
    loader.load_state_dict({**state, "window": window, "samples": window * loader.window_size})
    loader.next()
    return loader


def _resident() -> tuple[float, float]:
    """Return this process's resident memory in MiB: private, and of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024, int(status["RssFile"].split()[0]) / 1024


if __name__ == "__main__":
    main()
