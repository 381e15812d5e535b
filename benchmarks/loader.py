"""Batches ready for the model, in real tokens a second on one core, against torch's ``DataLoader`` with transformers'
``DataCollatorForLanguageModeling`` over the same samples; and peak memory at two sizes of the corpus.

Both sides shuffle, lay samples out in rows and mask 15 % of the tokens. They take turns; medians are reported.

    python -m benchmarks.loader
"""

import argparse
import itertools
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import peers
from benchmarks.common import append_result, default_store, environment, print_table
from benchmarks.peers import Stopwatch
from pretrain.data.loader import Loader
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.data.tokenization import load_tokenizer
from pretrain.model.vocabulary import Vocabulary
from pretrain.objectives import build_objectives
from pretrain.objectives.base import parse_objectives

OURS, LIST, DATASET = "medley", "DataLoader over a list", "DataLoader over datasets.Dataset"
MEAN_LENGTH, LONGEST = 86, 128  # of the samples of the stores that memory is measured with, in tokens


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of data loading with masking.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--store", type=Path, metavar="FOLDER", help="prepared corpus (default: the embedded one)")
    add("--sequence", type=int, default=128, metavar="TOKENS", help="longest sample of the default one")
    add("--samples", type=int, default=256, metavar="N", help="a batch")
    add("--steps", type=int, default=40, metavar="N", help="timed batches a round")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each system")
    add("--memory", type=int, nargs="*", default=[4, 64], metavar="MTOKENS", help="corpus sizes to measure memory at")
    return parser


def main() -> None:
    """Run the benchmark, print its tables, and add it to benchmarks/results/loader.json."""
    args = parser().parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    corpus = args.store or default_store(args.sequence, 30522)
    store, tokenizer = Store(corpus / "train"), load_tokenizer(corpus / "tokenizer")
    speed = measure_speed(store, tokenizer, args)
    print_table(speed)
    memory = measure_memory(corpus / "tokenizer", args)
    if memory:
        print_table(memory)
    setup = {name: getattr(args, name) for name in ("samples", "steps", "rounds")}
    setup |= {"longest_sample": store.max_length, "mean_sample": round(store.meta["tokens"] / len(store), 1)}
    print(f"added to {append_result('loader', {**environment(), 'setup': setup, 'speed': speed, 'memory': memory})}")


def measure_speed(store: Store, tokenizer, args: argparse.Namespace) -> list[dict]:
    """Return a row for each system: medians over the rounds; ratios are ours to that row's, round by round."""
    systems = {name: make(store, tokenizer, args.samples) for name, make in SYSTEMS.items()}
    micros: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, batches in systems.items():
            next(batches)
            watch = Stopwatch("cpu")
            watch.start()
            tokens = sum(itertools.islice(batches, args.steps))
            micros[name].append(tuple(seconds / tokens * 1e6 for seconds in watch.stop()))
    rows = []
    for name, measured in micros.items():
        wall, cpu = (statistics.median(each[kind] for each in measured) for kind in (0, 1))
        ratios = [[peer[k] / ours[k] for peer, ours in zip(measured, micros[OURS], strict=True)] for k in (0, 1)]
        rows.append(
            {
                "system": name,
                "tokens/s": 1e6 / wall,
                "faster by": statistics.median(ratios[0]),
                "CPU ns/token": cpu * 1e3,
                "ratio": statistics.median(ratios[1]),
            }
        )
    return rows


def ours(store: Store, tokenizer, samples: int) -> Iterator[int]:
    """Yield the real tokens of each batch that Medley's loader and masker make."""
    vocabulary = Vocabulary.of(tokenizer)
    row_length = 4 * store.max_length
    rows = max(1, round(samples * store.meta["tokens"] / len(store) / row_length))
    sizes = {"row_length": row_length, "batch_rows": rows, "micro_batch_rows": rows}
    loader = Loader(store, seed=0, pad_id=vocabulary.pad_id, **sizes)
    objective = build_objectives(parse_objectives({"mlm": {}}, "benchmark"), vocabulary, seed=0)["mlm"]
    while True:
        batch = loader.next()
        for micro_batch in batch.micro_batches:
            objective.corrupt(micro_batch, progress=0.0)
        yield batch.tokens


def over_list(store: Store, tokenizer, samples: int) -> Iterator[int]:
    """Yield the real tokens of each batch of a ``DataLoader`` over Python lists."""
    return _peer(peers.examples(store, Vocabulary.of(tokenizer)), tokenizer, samples)


def over_dataset(store: Store, tokenizer, samples: int) -> Iterator[int]:
    """Yield the real tokens of each batch of a ``DataLoader`` over a Hugging Face dataset."""
    from datasets import Dataset

    return _peer(Dataset.from_list(peers.examples(store, Vocabulary.of(tokenizer))), tokenizer, samples)


def _peer(dataset, tokenizer, samples: int) -> Iterator[int]:
    loader = DataLoader(dataset, samples, shuffle=True, collate_fn=peers.collator(tokenizer))
    while True:
        for batch in loader:
            yield int(batch["attention_mask"].sum())


SYSTEMS: dict[str, Callable[[Store, object, int], Iterator[int]]] = {
    OURS: ours,
    LIST: over_list,
    DATASET: over_dataset,
}


def measure_memory(tokenizer: Path, args: argparse.Namespace) -> list[dict]:
    """Return peak memory of a fresh process that reads a whole epoch, for each system and size of the corpus."""
    rows = []
    for millions in args.memory:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            synthesise(store, millions * 10**6)
            for name in (OURS, LIST):
                with get_context("spawn").Pool(1) as pool:
                    private, mapped = pool.apply(peak_memory, (name, store, tokenizer, args.samples))
                rows.append({"system": name, "M tokens": millions, "MiB": private, "MiB of mapped files": mapped})
    return rows


def synthesise(folder: Path, tokens: int) -> None:
    """Write a store of random tokens in samples of 44 to 128."""
    generator, writer = np.random.default_rng(0), StoreWriter(folder, 30522)
    while writer.token_count < tokens:
        lengths = generator.integers(2 * MEAN_LENGTH - LONGEST, LONGEST + 1, 10_000)
        writer.append(generator.integers(5, 30522, lengths.sum()), lengths)
    writer.close()


def peak_memory(name: str, store: Path, tokenizer: Path, samples: int) -> tuple[float, float]:
    """Return by how much a system's memory grows while it makes batches, in MiB: the process's own, and mapped files,
    which the kernel takes back when it needs the room."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer)
    start = _resident()
    opened = Store(store)
    peaks = start
    wanted = min(opened.meta["tokens"], 4_000_000)
    for tokens in SYSTEMS[name](opened, tokenizer, samples):
        peaks = tuple(map(max, peaks, _resident()))
        wanted -= tokens
        if wanted <= 0:
            return tuple(peak - before for peak, before in zip(peaks, start, strict=True))


def _resident() -> tuple[float, float]:
    """Return this process's resident memory in MiB: private, and of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    main()
