"""What weighing samples costs: steps of PRESENCE over uniform steps of the same BERT, in time and in peak memory.

A whole step is timed, from the batch to the update of the weights. All ways to weigh take turns on one model, and
ratios are taken round by round; on a CPU of CPU time. Samples are all as long as a row, and rows are not packed: for
the exact norms that is the dearest case. Steps have one micro-step where samples are weighed, four where micro-batches
are. Beside the memory stands that of the activations, which autograd keeps in a uniform step, of one micro-step.

    python -m benchmarks.presence
"""

import argparse
import ctypes
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT, append_result, default_store, environment, now, print_table
from benchmarks.training import build_trainer
from pretrain.data.output import whole_folder
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.influence import build_weigher
from pretrain.recipe import recipe_from
from pretrain.training.build import device_type
from pretrain.training.trainer import Trainer
from pretrain.training.weighing import Weighing

UNIFORM = "uniform"
WAYS = {
    "layer norms": {"score": "layer_norm", "layers": "all"},
    "sketch, first block": {"score": "sketch"},
    "sketch, all layers": {"score": "sketch", "layers": "all"},
    "exact, first block": {"score": "gram"},
    "exact, all layers": {"score": "gram", "layers": "all"},
    "exact, first block, two passes": {"score": "gram", "gradient": "two_pass"},
}
"""Title → keys of the weigher, deferred where nothing else is said."""
MICRO_BATCHES = "micro-batches (the paper's)"
WAYS_OF_MICRO_BATCHES = {
    MICRO_BATCHES: {"granularity": "microbatch"},
    "micro-batches, two passes": {"granularity": "microbatch", "gradient": "two_pass"},
}
PARTS = 4
"""Micro-batches of a step that weighs them."""
GOALS = {
    ("layer norms", 128): 1.03,
    ("layer norms", 512): 1.03,
    ("sketch, first block", 128): 1.06,
    ("sketch, all layers", 128): 1.06,
    ("exact, first block", 128): 1.12,
    ("exact, all layers", 128): 1.12,
    ("exact, first block", 512): 1.25,
    ("exact, all layers", 512): 1.25,
    (MICRO_BATCHES, 128): 1.10,
    (MICRO_BATCHES, 512): 1.10,
}
"""Way and tokens of a sample → the most that a step may cost, in uniform ones."""
WARMUP_ROUNDS = 1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's ``mallopt``."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = device_type() == "cuda"
    config = ROOT / "configs" / "ds" / ("zero2-bf16.json" if gpu else "cpu.json")
    add = parser.add_argument
    add("--sequences", type=int, nargs="+", default=[128, 512], metavar="TOKENS", help="of every sample")
    add("--layers", type=int, default=12, metavar="N", help="of the BERT; base has 12")
    add("--hidden", type=int, default=768, metavar="N", help="width of the BERT, 64 a head; base has 768")
    add("--vocabulary", type=int, default=30522, metavar="N", help="entries of the tokenizer")
    add("--tokens", type=int, default=32768 if gpu else 2048, metavar="N", help="of a micro-step")
    add("--rounds", type=int, default=5 if gpu else 3, metavar="N", help="turns of each way to weigh")
    add("--only", default="", metavar="TEXT", help="measure the ways whose title has this in it")
    add("--threads", type=int, default=1, metavar="N", help="of torch, on a CPU")
    add("--ds_config", type=Path, default=config, metavar="FILE", help="DeepSpeed JSON")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/presence.json."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    table = []
    for sequence in args.sequences:
        for parts, ways in ((1, WAYS), (PARTS, WAYS_OF_MICRO_BATCHES)):
            if chosen := {title: {"name": "presence", **ways[title]} for title in ways if args.only in title}:
                table += measure(args, sequence, parts, chosen)
    print_table(table)
    names = ("layers", "hidden", "vocabulary", "tokens", "rounds", "only", "threads")
    setup = {name: getattr(args, name) for name in names} | {"ds_config": args.ds_config.name}
    print(f"added to {append_result('presence', {**environment(), 'setup': setup, 'results': table})}")


def measure(args: argparse.Namespace, sequence: int, parts: int, ways: Mapping[str, dict]) -> list[dict]:
    """Measure ways to weigh, and uniform weights, in steps of so many micro-batches."""
    rows = max(2, args.tokens // sequence)
    with tempfile.TemporaryDirectory() as run:
        document = {
            "run": run,
            "data": {
                "store": str(full_store(sequence, args.vocabulary)),
                "row_length": sequence,
                "packing": False,
            },
            "model": {
                "family": "bert",
                "size": None,
                "dropout": 0.1,
                "overrides": {
                    "hidden_size": args.hidden,
                    "num_hidden_layers": args.layers,
                    "num_attention_heads": max(1, args.hidden // 64),
                    "intermediate_size": 4 * args.hidden,
                },
            },
            "objectives": {"mlm": {}},
            "training": {
                "steps": 10**6,
                "batch_rows": parts * rows,
                "micro_batch_rows": rows,
            },
            "heldout": {"rows": 0},
            "log": {"interval_steps": 10**6},
        }
        trainer = build_trainer(recipe_from(document, "benchmarks/presence.py"), args.ds_config)
        ways = {UNIFORM: {}, **ways}
        seconds = step_seconds(trainer, ways, args.rounds)
        activations = activation_mebibytes(trainer)
        peaks = {title: peak_mebibytes(trainer, keys) for title, keys in ways.items()}
        passes = {title: _passes(trainer, keys) for title, keys in ways.items()}
        trainer.engine.close()
    table = []
    for title in ways:
        ratios = np.divide(seconds[title], seconds[UNIFORM])
        goal = GOALS.get((title, sequence))
        value = statistics.median(ratios)
        table.append(
            {
                "weights": title,
                "sample, tokens": sequence,
                "micro-batches": parts,
                "gradient": passes[title],
                "s a step": statistics.median(seconds[title]),
                "of uniform": value,
                "least": min(ratios),
                "most": max(ratios),
                "goal": goal,
                "met": None if goal is None else "yes" if value <= goal else "no",
                "more at the peak, MiB": peaks[title] - peaks[UNIFORM],
                "activations, MiB": activations,
            }
        )
    return table


def step_seconds(trainer: Trainer, ways: Mapping[str, dict], rounds: int) -> dict[str, list[float]]:
    """Return way to weigh → seconds of a step in each round; ``ways`` are the recipe's ``weigher``, and take turns."""
    weighings = {title: weighing_of(trainer, keys) for title, keys in ways.items()}
    seconds: dict[str, list[float]] = {title: [] for title in ways}
    for turn in range(WARMUP_ROUNDS + rounds):
        for title, weighing in weighings.items():
            trainer.weighing = weighing
            began = now()
            trainer.train_step()
            if turn >= WARMUP_ROUNDS:
                seconds[title].append(now() - began)
    return seconds


def peak_mebibytes(trainer: Trainer, keys: dict) -> float:
    """Return by how much memory grows at most within a step of a way to weigh, in MiB: the process's, or the GPU's."""
    trainer.weighing = weighing_of(trainer, keys)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.train_step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)  # what tensors give back leaves the process at once
    libc.malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.train_step()
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most to which both grow by themselves
    libc.mallopt(_TRIM_THRESHOLD, 1 << 26)
    return (_status("VmHWM") - before) / 1024


def activation_mebibytes(trainer: Trainer) -> float:
    """Return what autograd keeps in a uniform step (of its largest micro-step) besides the weights, in MiB."""
    weights = {each.untyped_storage().data_ptr() for each in trainer.model.parameters()}
    kept: list[dict[int, int]] = [{}]  # storage → bytes, of each micro-step

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[-1][storage.data_ptr()] = storage.nbytes()
        return tensor

    def give_back(tensor: torch.Tensor) -> torch.Tensor:
        if kept[-1]:  # the first of a backward
            kept.append({})
        return tensor

    trainer.weighing = weighing_of(trainer, {})
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        trainer.train_step()
    return max(sum(each.values()) for each in kept) / 2**20


def weighing_of(trainer: Trainer, keys: dict) -> Weighing:
    """Return what weighs the samples of a trainer's model as ``keys``, the recipe's ``weigher``, say."""
    document = trainer.recipe.model_dump(mode="json", by_alias=True) | {"weigher": keys}
    recipe = recipe_from(document, "weigher")
    able = {name: not objective.couples_samples for name, objective in trainer.model.objectives.items()}
    weigher = build_weigher(recipe.weigher_config, able, trainer.sampler.mixes, recipe.seed, recipe.training.steps)
    return Weighing(replace(trainer.parts, recipe=recipe, weigher=weigher), trainer.engine)


def full_store(sequence: int, vocabulary: int) -> Path:
    """Return a corpus of the embedded text whose samples all have ``sequence`` tokens; made at first use."""
    folder = ROOT / "runs" / "benchmarks" / f"full-{sequence}-{vocabulary}"
    if not folder.is_dir():
        source = default_store(128, vocabulary)
        store = Store(source / "train")
        first, last = (int(store[0][place]) for place in (0, -1))
        tokens = store.tokens[:]
        text = tokens[~np.isin(tokens, (first, last))]
        samples = np.empty((len(text) // (sequence - 2), sequence), np.int64)
        samples[:, 0], samples[:, -1] = first, last
        samples[:, 1:-1] = text[: len(samples) * (sequence - 2)].reshape(len(samples), -1)
        with whole_folder(folder, False, ("tokenizer", "train/meta.json")) as partial:
            (partial / "tokenizer").symlink_to(source / "tokenizer")
            writer = StoreWriter(partial / "train", vocabulary)
            writer.append(samples.reshape(-1), np.full(len(samples), sequence))
            writer.close(tokenizer=store.meta["tokenizer"])
    return folder


def _passes(trainer: Trainer, keys: dict) -> str:
    weighing = weighing_of(trainer, keys)
    if weighing.by_micro_batch:
        return "two passes" if keys.get("gradient") == "two_pass" else "kept"
    if not weighing.scoring.ghosts:
        return "one pass"
    return "two passes" if weighing.why_two_passes or not weighing.scoring.defers else "deferred"


def _status(field: str) -> int:
    """Return a size of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
