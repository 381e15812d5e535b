"""What a rank sends in a step and how long that takes, against what ``medley plan`` says.

Two ranks, each in a network namespace of its own, joined by a virtual cable of limited bandwidth: bytes are counted at
its end, for every ZeRO stage. A step should take as long as one without a limit, and the bytes' time on top. Needs
root, and iproute2.

    python -m benchmarks.scaling
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.bert import SEQUENCE, VOCABULARY, document
from benchmarks.common import ROOT, append_result, default_store, environment, print_table
from benchmarks.scaling_rank import RANKS
from pretrain.planning.command import optimizer_groups
from pretrain.planning.communication import sent_per_step
from pretrain.planning.zero import Zero, numel
from pretrain.recipe import recipe_from
from pretrain.training.build import build
from pretrain.training.ds_config import resolve_ds_config
from tests.cluster.netns import Nodes, missing, variables

STAGES = ("zero0", "zero1", "zero2", "zero2-bf16", "zero3", "zero3-bf16")
WIDTH, LAYERS, BATCH_ROWS = 128, 6, 8
LIMIT_SECONDS = 1800
"""For one configuration."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--store", type=Path, metavar="FOLDER", help="prepared corpus (default: the embedded one)")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="NAME", help="JSONs of configs/ds")
    add("--accumulation", nargs="+", type=int, default=(1, 4), metavar="N", help="micro-steps of a step")
    add("--megabits", nargs="+", type=float, default=(1000.0, 200.0), metavar="N", help="bandwidths, a second")
    add("--steps", type=int, default=3, metavar="N", help="timed at each bandwidth")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/scaling.json."""
    args = parser().parse_args()
    if reason := missing():
        sys.exit(f"benchmarks.scaling: cannot make the nodes: {reason}")
    store = args.store or default_store(SEQUENCE, VOCABULARY)
    parts = build(recipe_from(_recipe(store, 1), "benchmarks/scaling.py"), dtype=torch.float32)
    groups, table = optimizer_groups(parts), []
    with tempfile.TemporaryDirectory(prefix="nodes-") as folder, Nodes(Path(folder)) as nodes:
        for stage in args.stages:
            for accumulation in args.accumulation:
                found = _measure(nodes, _recipe(store, accumulation), _path(stage), args)
                planned = sent_per_step(groups, _zero(stage), accumulation, RANKS, "gloo")
                table += [_row(stage, accumulation, planned, found[0], each) for each in found]
                print_table(table[-len(found) :])
    print_table(table)
    setup = {"parameters": numel(groups), "ranks": RANKS, "rows": BATCH_ROWS, "sequence": SEQUENCE, "steps": args.steps}
    print(f"added to {append_result('scaling', {**environment(), 'setup': setup, 'results': table})}")


def _measure(nodes: Nodes, recipe: dict, ds_config: Path, args: argparse.Namespace) -> list[dict]:
    """Run both ranks; return what they have measured, the link without a limit first."""
    bandwidths = json.dumps([None, *(1e6 * each for each in args.megabits)])
    command = [sys.executable, "-m", "benchmarks.scaling_rank", "--recipe", json.dumps(recipe)]
    command += ["--ds_config", str(ds_config), "--bandwidths", bandwidths, "--steps", str(args.steps)]
    outputs = [nodes.folder / f"rank-{rank}.txt" for rank in range(RANKS)]
    ranks = [nodes.run(rank, command, outputs[rank], **variables(rank)) for rank in range(RANKS)]
    codes = [rank.wait(LIMIT_SECONDS) for rank in ranks]
    text = outputs[0].read_text()
    if any(codes):
        sys.exit(f"benchmarks.scaling: {ds_config.name} failed:\n{text}{outputs[1].read_text()}")
    return json.loads(next(line for line in text.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def _row(stage: str, accumulation: int, planned: float, unlimited: dict, found: dict) -> dict:
    bandwidth = found["bits_per_second"]
    modelled = unlimited["seconds"] + planned * 8 / bandwidth if bandwidth else None
    return {
        "configuration": stage,
        "accumulation": accumulation,
        "Mbit/s": bandwidth / 1e6 if bandwidth else None,
        "sent MB": found["sent"] / 1e6,
        "planned MB": planned / 1e6,
        "sent, ratio": found["sent"] / planned,
        "step s": found["seconds"],
        "modelled s": modelled,
        "step, ratio": found["seconds"] / modelled if modelled else None,
    }


def _recipe(store: Path, accumulation: int) -> dict:
    rows = BATCH_ROWS // RANKS // accumulation
    return document(store, width=WIDTH, layers=LAYERS, batch_rows=BATCH_ROWS, micro_batch_rows=rows)


def _path(stage: str) -> Path:
    return ROOT / "configs" / "ds" / f"{stage}.json"


def _zero(stage: str) -> Zero:
    config = resolve_ds_config(
        _path(stage), micro_batch_rows=1, batch_rows=RANKS, world_size=RANKS, gradient_clipping=1.0, device_type="cpu"
    )
    return Zero.of(config)


if __name__ == "__main__":
    main()
