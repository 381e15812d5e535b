"""What each rank of ``benchmarks.scaling`` does: steps on one configuration, at one bandwidth after another.

Runs on a node of ``tests/cluster/netns.py``, whose cable it limits itself; rank 0 prints the result as JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.training import open_trainer
from pretrain.recipe import recipe_from
from pretrain.training.build import build
from pretrain.training.ds_config import resolve_ds_config
from pretrain.training.trainer import Trainer
from tests.cluster.netns import limit, traffic

RANKS = 2


def main() -> None:
    """Train; print a list with an entry for each bandwidth."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=json.loads, required=True)
    parser.add_argument("--ds_config", type=Path, required=True)
    parser.add_argument("--bandwidths", type=json.loads, required=True, help="bits a second, null for no limit")
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_from(args.recipe, "benchmarks/scaling.py")
    config = resolve_ds_config(
        args.ds_config,
        micro_batch_rows=recipe.training.micro_batch_rows,
        batch_rows=recipe.training.batch_rows,
        world_size=RANKS,
        gradient_clipping=recipe.training.gradient_clipping,
        device_type="cpu",
    )
    parts = build(recipe, dtype=torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
    trainer = open_trainer(parts, config)
    trainer.train_step()  # stage 3 has learnt the order of the weights after the first
    found = [measure(trainer, bandwidth, args.steps) for bandwidth in args.bandwidths]
    limit(None)
    if trainer.engine.rank == 0:
        print("RESULT " + json.dumps(found), flush=True)
    trainer.engine.close()


def measure(trainer: Trainer, bits_per_second: float | None, steps: int) -> dict:
    """Return bytes a rank sends in a step, the mean of both, and the median step's seconds."""
    limit(bits_per_second)
    trainer.engine.barrier()
    trainer.train_step()  # fills what a cable lets through at once
    trainer.engine.barrier()
    before, seconds = traffic(), []
    for _ in range(steps):
        began = time.monotonic()
        trainer.train_step()
        trainer.engine.barrier()
        seconds.append(time.monotonic() - began)
    sent = (traffic() - before).sent
    total = float(trainer.engine.all_reduce([float(sent)]))
    return {"bits_per_second": bits_per_second, "sent": total / RANKS / steps, "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    main()
