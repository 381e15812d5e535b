"""What a whole process takes in a step, against what ``medley plan`` says.

Two ranks on the CPU train a small model and one of some tens of millions of parameters, each in processes of their
own; from one to the other the peak of resident memory within a step should grow as the plan does. What does not depend
on the model (the interpreter, libraries, the data) is in both.

    python -m benchmarks.memory
"""

import argparse
import gc
import os
import re
from pathlib import Path

import torch

from benchmarks.bert import SEQUENCE, VOCABULARY, document
from benchmarks.common import ROOT, append_result, default_store, environment, print_table
from benchmarks.training import open_trainer
from pretrain.planning.activations import measure
from pretrain.planning.command import optimizer_groups
from pretrain.planning.memory import model_states
from pretrain.planning.zero import Zero, numel
from pretrain.recipe import Recipe, recipe_from
from pretrain.training.build import Parts, build
from pretrain.training.ds_config import resolve_ds_config
from tests.distributed import RankPool

RANKS, BUCKET = 2, 5_000_000
SIZES = {"small": (16, 1), "large": (384, 8)}  # width and layers
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has the system take back at once what is given back."""
LIMIT_SECONDS = 1800


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/memory.json."""
    stages = sorted(path.stem for path in (ROOT / "configs" / "ds").glob("zero*.json"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="prepared corpus (default: the embedded one)")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, metavar="NAME", help="of configs/ds")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="of a micro-batch")
    args = parser.parse_args()
    store = args.store or default_store(SEQUENCE, VOCABULARY)
    os.environ.update(MALLOC)
    table = [_row(stage, store, args.rows) for stage in args.stages]
    print_table(table)
    setup = {"ranks": RANKS, "rows": args.rows, "sequence": SEQUENCE, "bucket": BUCKET, "sizes": SIZES}
    print(f"added to {append_result('memory', {**environment(), 'setup': setup, 'results': table})}")


def _row(stage: str, store: Path, rows: int) -> dict:
    measured, planned, parameters = {}, {}, {}
    for size, (width, layers) in SIZES.items():
        recipe = document(store, width=width, layers=layers, batch_rows=2 * RANKS * rows, micro_batch_rows=rows)
        config = _config(stage, recipe_from(recipe, "benchmarks/memory.py"))
        pool = RankPool()
        try:
            peaks = pool.run(step_peak, recipe, config, world_size=RANKS, time_limit_seconds=LIMIT_SECONDS)
        finally:
            pool.close()
        measured[size], (planned[size], parameters[size]) = max(peaks), _planned(recipe, config, rows)
    growth, plan = (values["large"] - values["small"] for values in (measured, planned))
    row = {
        "configuration": stage,
        "parameters": parameters["large"] - parameters["small"],
        "grown MB": growth / 1e6,
        "planned MB": plan / 1e6,
        "planned, ratio": plan / growth,
        "whole process MB": measured["large"] / 1e6,
    }
    print_table([row])
    return row


def step_peak(recipe: dict, config: dict) -> int:
    """On each rank: train three steps; return the most bytes of this process that were resident in the third."""
    trainer = open_trainer(_build(recipe, config), config)
    for _ in range(2):
        trainer.train_step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.train_step()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    trainer.engine.close()
    return peak


def _planned(recipe: dict, config: dict, rows: int) -> tuple[int, int]:
    """Return the bytes that the plan has for a rank of a CPU, where host and device are one, and the parameters."""
    parts, zero = _build(recipe, config), Zero.of(config)
    groups = optimizer_groups(parts)
    [activations] = measure(parts, zero.dtype, attention=torch.float32).values()
    states = model_states(groups, zero, RANKS)
    return states.peak(int(activations.at(rows))) + states.host, numel(groups)


def _build(recipe: dict, config: dict) -> Parts:
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    return build(recipe_from(recipe, "benchmarks/memory.py"), dtype=dtype)


def _config(stage: str, recipe: Recipe) -> dict:
    """Return a configuration with buckets that are filled: memory that is never written is not resident."""
    config = resolve_ds_config(
        ROOT / "configs" / "ds" / f"{stage}.json",
        micro_batch_rows=recipe.training.micro_batch_rows,
        batch_rows=recipe.training.batch_rows,
        world_size=RANKS,
        gradient_clipping=recipe.training.gradient_clipping,
        device_type="cpu",
    )
    zero = config["zero_optimization"]
    zero |= {key: BUCKET for key in ("reduce_bucket_size", "allgather_bucket_size") if key in zero}
    return config


if __name__ == "__main__":
    main()
