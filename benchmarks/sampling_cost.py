"""What learning the mixture costs: time of MOMETAS' measurements over the steps between them, and of META-TARTAN's
steps over MT-TARTAN's.

Each figure is a ratio within one run: measurements against the steps of the same windows; a step of META-TARTAN
against the backward passes that it is made of, each timed alone, and against a step of MT-TARTAN in the same round.
The task is made up of sentences of the corpus, as its labels do not matter here.

    python -m benchmarks.sampling_cost --size small
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import ROOT, append_result, default_store, environment, now, print_table
from benchmarks.training import build_trainer
from pretrain.data.annotate import annotate
from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.recipe import recipe_from
from pretrain.training.build import device_type
from pretrain.training.trainer import Trainer

FIVE = {"mlm": {}, "itd": {}, "dtd": {}, "cse": {"group_rows": 4}, "guided_mlm": {}}
LABELLED = {"train": 256, "dev": 128, "test": 16}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = device_type() == "cuda"
    config = ROOT / "configs" / "ds" / ("zero2-bf16.json" if gpu else "cpu.json")
    add = parser.add_argument
    add("--store", type=Path, metavar="FOLDER", help="prepared corpus (default: the embedded one)")
    add("--sequence", type=int, default=512 if gpu else 128, metavar="TOKENS", help="longest sample of the default one")
    add("--size", choices=("tiny", "small", "base"), default="base" if gpu else "tiny", help="of the BERT")
    add("--vocabulary", type=int, default=30522 if gpu else 8192, metavar="N", help="entries of the tokenizer")
    add("--rows", type=int, default=64 if gpu else 32, metavar="N", help="of a step's batch, of --sequence tokens each")
    add("--interval", type=int, default=100, metavar="K", help="MOMETAS' steps between updates")
    add("--rounds", type=int, default=5, metavar="N", help="turns of TARTAN's steps")
    add("--ds_config", type=Path, default=config, metavar="FILE", help="DeepSpeed JSON")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser


def main() -> None:
    """Run the benchmark, print its table, and add it to benchmarks/results/sampling_cost.json."""
    args = parser().parse_args()
    store = args.store or default_store(args.sequence, args.vocabulary)
    if not (store / "train" / "annotations" / "salient").is_dir():
        annotate(store, "salient")
    table = [*mometas(args, store), *tartan(args, store)]
    print_table(table)
    setup = {name: getattr(args, name) for name in ("size", "vocabulary", "sequence", "rows", "interval", "rounds")}
    print(f"added to {append_result('sampling_cost', {**environment(), 'setup': setup, 'results': table})}")


def mometas(args: argparse.Namespace, store: Path) -> list[dict]:
    """Time one window of each way to learn the mixture."""
    rows = []
    for title, keys, goal in (
        ("mometas, paper", {"reward": "paper"}, 0.05),
        ("mometas, bursts", {"credit": "bursts"}, 0.05),
        ("mometas, gradients", {"credit": "gradients"}, 0.05),
    ):
        sampler = {"name": "mometas", "interval_steps": args.interval, **keys}
        trainer = _trainer(args, store, FIVE, sampler)
        for _ in range(2):
            trainer.train_step()
        teach, spent = trainer.teach_sampler, []

        def timed(teach=teach, spent=spent):
            began = now()
            told = teach()
            spent.append(now() - began)
            return told

        trainer.teach_sampler = timed
        began = now()
        for _ in range(args.interval):  # from the third step on: one whole window's worth of measurements
            trainer.train_step()
        whole = now() - began
        trainer.engine.close()
        rows.append(_row(title, "its measurements over its steps", sum(spent) / (whole - sum(spent)), goal))
    return rows


def tartan(args: argparse.Namespace, store: Path) -> list[dict]:
    """Time steps of META-TARTAN, what they are made of, and steps of MT-TARTAN, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        task = _write_task(Path(folder) / "task", store)
        objectives = {"mlm": {}, "task_mlm": {"task": str(task)}, "end_task": {"task": str(task)}}
        dev = {"dev_samples": max(1, args.rows // 2), "head_samples": max(1, args.rows // 4)}  # as the paper has them
        meta = _trainer(args, store, objectives, {"name": "meta_tartan", "interval_steps": 10, **dev})
        every, between, plain, parts = [], [], [], []
        for _ in range(args.rounds + 1):
            parts.append(_passes(meta))
            every.append(_time(meta.train_step))  # the first of ten: compares
            between.append(sum(_time(meta.train_step) for _ in range(9)))
        meta.engine.close()
        mt = _trainer(args, store, objectives, {"name": "mt_tartan"})
        plain = [sum(_time(mt.train_step) for _ in range(10)) for _ in range(args.rounds + 1)]
        mt.engine.close()
    step, passes, ten = (statistics.median(each[1:]) for each in (every, parts, plain))
    rest = statistics.median(between[1:])
    return [
        _row(
            "meta_tartan, every step", "a step over its objectives' and the dev gradient's passes", step / passes, 1.15
        ),
        _row("meta_tartan, every 10 steps", "ten steps over ten of mt_tartan, less 1", (step + rest) / ten - 1, 0.10),
    ]


def _passes(trainer: Trainer) -> float:
    """Return the seconds of each objective's forward and backward on a step's batch, and of the dev gradient's."""
    batch = trainer.loader.next()
    plan = trainer.sampler.plan(trainer.step)
    views = [trainer.corrupt(each, plan) for each in batch.micro_batches]
    targets, _ = trainer.count(views)

    def of(name: str) -> None:
        trainer.engine.begin_step()
        trainer.accumulate([{name: each[name]} for each in views], trainer.loss_scales({name: 1.0}, targets))

    seconds = sum(_time(lambda name=name: of(name)) for name in plan)
    return seconds + _time(lambda: trainer.dev_gradient.measure(trainer.step))


def _trainer(args: argparse.Namespace, store: Path, objectives: dict, sampler: dict) -> Trainer:
    document = {
        "run": "unused",
        "data": {"store": str(store), "row_length": args.sequence},
        "model": {"size": args.size, "dropout": 0.1},
        "objectives": objectives,
        "sampler": sampler,
        "training": {
            "steps": 10 * args.interval,
            "batch_rows": args.rows,
            "micro_batch_rows": max(1, args.rows // 8),
            "schedule": {"shape": "constant", "warmup": 0.0},
        },
        "heldout": {"rows": 0},
    }
    return build_trainer(recipe_from(document, "benchmarks/sampling_cost.py"), args.ds_config)


def _write_task(folder: Path, store: Path) -> Path:
    """Write a task of the corpus' samples, labelled by turns."""
    train, tokenizer, at = Store(store / "train"), load_tokenizer(store / "tokenizer"), 0
    folder.mkdir()
    for split, size in LABELLED.items():
        texts = [tokenizer.decode(train[at + i], skip_special_tokens=True) for i in range(size)]
        at += size
        lines = [json.dumps({"text": text, "label": "ab"[number % 2]}) for number, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _time(work: Callable[[], object]) -> float:
    began = now()
    work()
    return now() - began


def _row(what: str, ratio: str, value: float, goal: float) -> dict:
    return {"what": what, "ratio": ratio, "value": value, "goal": goal, "met": "yes" if value <= goal else "no"}


if __name__ == "__main__":
    main()
