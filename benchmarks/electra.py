"""What ELECTRA and MCL cost: their steps over masked language modelling of the same discriminator, against the FLOPs.

A whole step is timed, from the batch to the update of the weights. All sets of objectives take turns on one model, and
ratios are taken round by round; on a CPU of CPU time. What they should be is the ratio of the FLOPs that are computed
(pretrain/training/flops.py). The optimizer's part of a step, which no FLOPs tell, is timed too.

    python -m benchmarks.electra
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT, append_result, environment, now, print_table
from benchmarks.presence import full_store
from benchmarks.training import build_trainer
from pretrain.recipe import recipe_from
from pretrain.sampling import build_sampler
from pretrain.sampling.rules import SharesConfig
from pretrain.training.build import device_type
from pretrain.training.trainer import Trainer

MLM, WHOLE = "MLM", "MCL: all four"
OBJECTIVES = {
    "mlm": {},
    "rtd": {},
    "std": {"generator_weight": 1, "discriminator_weight": 50},
    "itd": {"source": "generator", "discriminator_weight": 50},
    "correction": {},
}
PLANS = {
    MLM: ("mlm",),
    "ELECTRA: rtd": ("rtd",),
    "rtd, std": ("rtd", "std"),
    "rtd, itd": ("rtd", "itd"),
    "rtd, correction": ("rtd", "correction"),
    WHOLE: ("rtd", "std", "itd", "correction"),
}
"""Title → objectives of a step."""
SLACK = 0.15
"""By which a step may be dearer than its FLOPs say."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = device_type() == "cuda"
    config = ROOT / "configs" / "ds" / ("zero2-bf16.json" if gpu else "cpu.json")
    add = parser.add_argument
    add("--sequence", type=int, default=128, metavar="TOKENS", help="of every sample")
    add(
        "--layers", type=int, default=12 if gpu else 4, metavar="N", help="of the discriminator; the generator has half"
    )
    add("--hidden", type=int, default=768, metavar="N", help="width of both, 64 a head; base has 768")
    add("--vocabulary", type=int, default=30522, metavar="N", help="entries of the tokenizer")
    add("--tokens", type=int, default=32768 if gpu else 4096, metavar="N", help="of a step's batch")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each set of objectives")
    add("--threads", type=int, default=1, metavar="N", help="of torch, on a CPU")
    add("--ds_config", type=Path, default=config, metavar="FILE", help="DeepSpeed JSON")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/electra.json."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    table = measure(args)
    print_table(table)
    names = ("sequence", "layers", "hidden", "vocabulary", "tokens", "rounds", "threads")
    setup = {name: getattr(args, name) for name in names} | {"ds_config": args.ds_config.name}
    print(f"added to {append_result('electra', {**environment(), 'setup': setup, 'results': table})}")


def measure(args: argparse.Namespace) -> list[dict]:
    """Return the table: a row a set of objectives."""
    rows = max(1, args.tokens // args.sequence)
    with tempfile.TemporaryDirectory() as run:
        document = {
            "run": run,
            "data": {
                "store": str(full_store(args.sequence, args.vocabulary)),
                "row_length": args.sequence,
                "packing": False,
            },
            "model": {
                "family": "electra",
                "size": None,
                "dropout": 0.1,
                "overrides": {
                    "hidden_size": args.hidden,
                    "embedding_size": args.hidden,
                    "num_hidden_layers": args.layers,
                    "num_attention_heads": max(1, args.hidden // 64),
                    "intermediate_size": 4 * args.hidden,
                },
            },
            "objectives": OBJECTIVES,
            "training": {"steps": 10**6, "batch_rows": rows, "micro_batch_rows": rows},
            "heldout": {"rows": 0},
            "log": {"interval_steps": 10**6},
        }
        trainer = build_trainer(recipe_from(document, "benchmarks/electra.py"), args.ds_config)
        seconds, updates, passes = step_seconds(trainer, args.rounds)
        flops = {title: trainer.flops.per_token(plan) for title, plan in PLANS.items()}
        trainer.engine.close()
    table = []
    for title in PLANS:
        ratios = np.divide(seconds[title], seconds[MLM])
        value, due = statistics.median(ratios), flops[title] / flops[MLM]
        table.append(
            {
                "objectives": title,
                "backbone": passes[title]["backbone"],
                "generator": passes[title]["generator"],
                "s a step": statistics.median(seconds[title]),
                "of MLM": value,
                "least": min(ratios),
                "most": max(ratios),
                "by FLOPs": due,
                "dearer, %": 100 * (value / due - 1),
                "goal, %": None if title == MLM else 100 * SLACK,
                "met": None if title == MLM else "yes" if abs(value / due - 1) <= SLACK else "no",
                "optimizer, %": 100 * statistics.median(np.divide(updates[title], seconds[title])),
            }
        )
    return table


def step_seconds(
    trainer: Trainer, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, dict[str, float]]]:
    """Return, by set of objectives, seconds of a step in each round, those of its update, and its passes; before the
    rounds every set has a turn that does not count."""
    samplers, names = {}, list(OBJECTIVES)
    for title, plan in PLANS.items():
        config = SharesConfig(mode="mix", shares={name: float(name in plan) for name in names})
        samplers[title] = build_sampler(config, names, 0, trainer.recipe.training.steps)
    update, spent = trainer.engine.step, 0.0

    def timed(*arguments):
        nonlocal spent
        began = now()
        outcome = update(*arguments)
        spent = now() - began
        return outcome

    trainer.engine.step = timed
    seconds, updates, passes = {title: [] for title in PLANS}, {title: [] for title in PLANS}, {}
    for turn in range(1 + rounds):
        for title, sampler in samplers.items():
            trainer.sampler = sampler
            began = now()
            passes[title] = trainer.train_step()["passes"]
            if turn:
                seconds[title].append(now() - began)
                updates[title].append(spent)
    return seconds, updates, passes


if __name__ == "__main__":
    main()
