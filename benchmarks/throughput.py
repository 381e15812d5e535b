"""Training speed in real tokens a second against transformers' ``Trainer``: same model, weights, samples, optimizer.

Ours is the trainer as ``launch/train.py`` runs it (loader, packed rows, engine on DeepSpeed, one process); the peer
pads one sample a row with ``DataCollatorForLanguageModeling``, in random order and grouped by length. They take turns,
each from the same initial weights, and medians over the rounds are reported. Takes the GPU if there is one.

    python -m benchmarks.throughput --size small
"""

import argparse
import gc
import math
import os
import statistics
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.common import ROOT, append_result, default_store, environment, print_table
from benchmarks.peers import Measurement, Stopwatch
from benchmarks.training import open_trainer, resolved
from pretrain.data.store import Store
from pretrain.model.encoder import backbone_config
from pretrain.recipe import Recipe, recipe_from
from pretrain.training.build import Parts, build, device_type

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what init_distributed sets
OURS, PADDED, GROUPED = "medley", "transformers, random order", "transformers, grouped by length"


def parser() -> argparse.ArgumentParser:
    """Return the command line; what is not given depends on whether there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = device_type() == "cuda"
    config = ROOT / "configs" / "ds" / ("zero2-bf16.json" if gpu else "cpu.json")
    add = parser.add_argument
    add("--store", type=Path, metavar="FOLDER", help="prepared corpus (default: the embedded one)")
    add("--sequence", type=int, default=512 if gpu else 128, metavar="TOKENS", help="longest sample of the default one")
    add("--size", choices=("tiny", "small", "base"), default="base" if gpu else "small", help="of the BERT")
    add("--vocabulary", type=int, default=30522, metavar="N", help="entries of the model's")
    add("--dropout", type=float, default=0.0, metavar="P", help="every rate of the model")
    add("--samples", type=int, default=128 if gpu else 32, metavar="N", help="a step")
    add("--steps", type=int, default=10, metavar="N", help="timed steps a round")
    add("--warmup", type=int, default=2, metavar="N", help="steps before them")
    add("--rounds", type=int, default=3, metavar="N", help="turns of each system")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of the CPU, for both")
    add("--ds_config", type=Path, default=config, metavar="FILE", help="DeepSpeed JSON, which also says fp32 or bf16")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/throughput.json."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    store = args.store or default_store(args.sequence, args.vocabulary)
    recipe = make_recipe(args, store)
    ds_config, dtype = resolved(recipe, args.ds_config)
    parts = build(recipe, dtype=dtype)
    peer = Peer(parts, args, dtype)
    mfu: list[float | None] = []
    rounds: dict[str, list[Measurement]] = {OURS: [], PADDED: [], GROUPED: []}
    for _ in range(args.rounds):
        for name, measurements in rounds.items():
            if name == OURS:
                measurements.append(run_ours(build(recipe, dtype=dtype), ds_config, args, mfu))
            else:
                measurements.append(peer.run(by_length=name == GROUPED))
            gc.collect()
            print(f"{name:32} {measurements[-1].tokens_per_second:12,.0f} tokens/s", flush=True)
    table = summary(rounds, statistics.median(mfu) if None not in mfu else None)
    print_table(table)
    setup = {
        "parameters": sum(parts.sizes.values()),
        "mean_sample": round(parts.store.meta["tokens"] / len(parts.store), 1),
        "longest_sample": parts.store.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "ds_config": args.ds_config.name,
        "peer": "Trainer" if peers.has_trainer() else "plain loop",
    }
    names = ("size", "vocabulary", "dropout", "samples", "steps", "warmup", "rounds")
    setup |= {name: getattr(args, name) for name in names}
    print(f"added to {append_result('throughput', {**environment(), 'setup': setup, 'results': table})}")


def make_recipe(args: argparse.Namespace, store: Path) -> Recipe:
    """Return the recipe of our side; a global batch holds about ``--samples`` samples."""
    train = Store(store / "train")
    row_length = 4 * train.max_length  # what the recipe's default would be
    rows = max(1, round(args.samples * train.meta["tokens"] / len(train) / row_length))
    document = {
        "run": "unused",
        "data": {"store": str(store)},
        "model": {"size": args.size, "dropout": args.dropout, "overrides": {"vocab_size": args.vocabulary}},
        "objectives": {"mlm": {}},
        "training": {
            "steps": args.warmup + args.steps,
            "batch_rows": rows,
            "micro_batch_rows": rows,
            "schedule": {"shape": "constant", "warmup": 0.0},
        },
        "heldout": {"rows": 0},
    }
    return recipe_from(document, "benchmarks/throughput.py")


def run_ours(parts: Parts, ds_config: dict, args: argparse.Namespace, mfu: list[float | None]) -> Measurement:
    """Train with Medley's trainer on the engine; ``mfu`` gets the utilisation of the timed steps, if it is known."""
    trainer = open_trainer(parts, ds_config)
    for _ in range(args.warmup):
        trainer.train_step()
    watch = Stopwatch(device_type())
    watch.start()
    records = [trainer.train_step() for _ in range(args.steps)]
    seconds = watch.stop()
    mfu.append(statistics.median(r["mfu"] for r in records) if records[0]["mfu"] is not None else None)
    trainer.engine.close()
    for name in _VARIABLES:
        os.environ.pop(name, None)  # or the peer's Trainer would wrap its model for several processes
    return Measurement(sum(r["tokens"] for r in records), *seconds, [r["loss"] for r in records])


class Peer:
    """transformers on the same samples, model and settings, from the same initial weights every time."""

    def __init__(self, parts: Parts, args: argparse.Namespace, dtype: torch.dtype):
        from datasets import Dataset

        optimizer = parts.recipe.training.optimizer
        self.tokenizer = parts.tokenizer
        self.config = backbone_config(parts.recipe.model, parts.vocabulary, parts.store.max_length)
        self.weights = {name: each.clone() for name, each in parts.model.encoder.pretrained.state_dict().items()}
        self.dataset = Dataset.from_list(peers.examples(parts.store, parts.vocabulary))
        self.lengths = parts.store.lengths[:].tolist()
        self.settings = peers.Settings(
            samples=args.samples,
            steps=args.steps,
            warmup=args.warmup,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            betas=optimizer.betas,
            eps=optimizer.eps,
            gradient_clipping=parts.recipe.training.gradient_clipping,
            bf16=dtype == torch.bfloat16,
            device=device_type(),
        )

    def run(self, *, by_length: bool) -> Measurement:
        """Train anew."""
        model = peers.build_model(self.config, self.weights, self.settings.device)
        task = model, self.dataset, self.tokenizer, self.settings, self.lengths if by_length else None
        if not peers.has_trainer():
            return peers.run_loop(*task)
        with tempfile.TemporaryDirectory() as folder:
            return peers.run_trainer(*task, folder)


def summary(rounds: dict[str, list[Measurement]], mfu: float | None) -> list[dict]:
    """Return the table: medians over the rounds; ratios are ours to that row's, round by round."""
    rows = []
    for name, measurements in rounds.items():
        pairs = list(zip(rounds[OURS], measurements, strict=True))
        last = measurements[-1].losses
        rows.append(
            {
                "system": name,
                "tokens/s": statistics.median(m.tokens_per_second for m in measurements),
                "tokens/step": round(statistics.mean(m.tokens / len(m.losses) for m in measurements)),
                "faster by": statistics.median(o.tokens_per_second / m.tokens_per_second for o, m in pairs),
                "CPU µs/token": statistics.median(m.cpu_microseconds_per_token for m in measurements),
                "ratio": statistics.median(
                    m.cpu_microseconds_per_token / o.cpu_microseconds_per_token for o, m in pairs
                ),
                "first loss": last[0],
                "last loss": statistics.mean(last[-math.ceil(len(last) / 4) :]),
                "mfu": mfu if name == OURS else None,
            }
        )
    return rows


if __name__ == "__main__":
    main()
