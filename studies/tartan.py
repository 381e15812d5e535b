#!/usr/bin/env python3
"""Does it help to train the end task together with pre-training? TARTAN against TAPT and plain fine-tuning, at equal
compute.

A small model is pre-trained once on the domain texts of all tasks. From it every arm goes on, on every task and with
every seed: fine-tuning alone; TAPT, masked language modelling on the task's texts, then fine-tuning; MT-TARTAN and
META-TARTAN, the end task with masked language modelling on task and domain, then fine-tuning from the step best on dev.
All arms of a task may spend the same (studies/tartan_arms.py counts it). Steps and epochs are chosen on dev; test is
scored once a record. Settings are to be chosen by the scores on dev, which are shown while it runs.

    python studies/tartan.py [--tasks FOLDER] [--only NAMES] [--seeds 5] [--out FOLDER] [--results FILE] [--quick]

FOLDER has a folder for each task: train, dev and test files, and ``domain.txt``. What is done is kept: the same command
goes on where it stopped, and more seeds or arms are added to it.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script; when it is imported they are there

from benchmarks.common import environment  # noqa: E402
from pretrain.data.prepare import prepare  # noqa: E402
from pretrain.data.tasks import Split, Task, limit_split, load_task  # noqa: E402
from studies import records, reporting, tartan_report  # noqa: E402
from studies.command import add_settings, exit_code, names, say, settings_of  # noqa: E402
from studies.tartan_arms import ARMS, Place, Settings, pretrain_base, run_arm  # noqa: E402

AGAINST = "none"
TASKS = ("citation_intent", "sciie", "chemprot")
QUICK = Settings(hidden=32, layers=1, base_steps=4, epochs=4, tune_epochs=1, batch=4, dev_samples=2, scorings=2)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    data = Path(os.environ.get("MEDLEY_DATA", ROOT.parent / "shared" / "data"))
    add = parser.add_argument
    add("--tasks", type=Path, default=data / "tasks", metavar="FOLDER", help="a folder for each task")
    add("--only", default=",".join(TASKS), metavar="NAMES", help="tasks to run; all share the base model")
    add("--arms", default=",".join(ARMS), metavar="NAMES", help="arms to run")
    add("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N − 1")
    add("--max-train", type=int, default=600, metavar="N", help="training samples of a task at most")
    add("--max-dev", type=int, default=150, metavar="N", help="dev samples of a task at most")
    add("--vocabulary", type=int, default=2048, metavar="N", help="entries of the tokenizer that is trained")
    add("--out", type=Path, default=ROOT / "runs" / "studies" / "tartan", metavar="FOLDER", help="working folder")
    add("--results", type=Path, metavar="FILE", help="name of the results without suffix (default: OUT/results)")
    add("--quick", action="store_true", help="a model and a budget that show only that it runs")
    add_settings(parser, Settings())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the study; return the exit code."""
    return exit_code(study, parser().parse_args(argv))


def study(args: argparse.Namespace) -> list[Path]:
    """Do what is left of the study; return the files of results."""
    tasks = sorted(path.parent.name for path in args.tasks.glob("*/domain.txt"))
    wanted = names(args.only, tasks, "task with a domain.txt", f"--tasks {args.tasks}")
    arms = names(args.arms, ARMS, "arm", "--arms")
    settings = settings_of(args, QUICK if args.quick else Settings())
    places = _prepare(args, wanted, settings)
    for seed in range(args.seeds):
        for place in places:
            for arm in arms:
                if not records.has(args.out, task=place.name, arm=arm, seed=seed):
                    began = time.perf_counter()
                    record = run_arm(arm, place, seed, settings)
                    records.add(args.out, record | {"seconds": time.perf_counter() - began})
                    say(f"seed {seed}, {place.name}, {arm}: {record['metric']} on dev {100 * record['dev']:.1f} %")
    return report(args, settings)


def report(args: argparse.Namespace, settings: Settings) -> list[Path]:
    """Write and print the results of all records that there are."""
    done = [record for record in records.read(args.out) if record["seed"] < args.seeds]
    rows = tartan_report.summarise(done, ARMS, AGAINST)
    where = environment()
    result = {"environment": where, "settings": _identity(args, settings), "records": done}
    note = (
        f"RoBERTa with norms before the layers, {settings.layers} × {settings.hidden}, {settings.base_steps} steps of "
        f"pre-training on the domain texts; at most {args.max_train} samples of train and {args.max_dev} of dev. All "
        f"arms spend {settings.epochs} epochs of fine-tuning in passes of tokens. Mean ± sd over seeds; differences "
        "seed by seed, how many are above 0, and their two-sided p-values. "
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load']}, torch "
        f"{where['versions']['torch']}, {where['date'][:10]}."
    )
    path = args.results or args.out / "results"
    text = f"{note}\n\n{tartan_report.markdown(rows, AGAINST)}"
    files = reporting.write(path.parent, path.name, text, rows, result, tartan_report.plot)
    print(files[0].read_text(), end="")
    return files


def _prepare(args: argparse.Namespace, names: list[str], settings: Settings) -> list[Place]:
    """Prepare tasks, corpora and the base model, as far as they are not there; refuse a folder with another study's."""
    records.claim(args.out, _identity(args, settings) | {"base": sorted(names)})
    corpus, base = args.out / "corpus", args.out / "base"
    shape = {"heldout": 0, "max_length": settings.max_length, "workers": 1}
    if not corpus.is_dir():
        texts = [args.tasks / name / "domain.txt" for name in names]
        prepare(texts, corpus, vocabulary=args.vocabulary, lowercase=True, **shape)
    places = []
    for name in names:
        own, folder = args.out / "corpora" / name, args.out / "tasks" / name
        if not own.is_dir():
            prepare([args.tasks / name / "domain.txt"], own, tokenizer=corpus / "tokenizer", **shape)
        if not folder.is_dir():
            _write_task(load_task(args.tasks / name), folder, {"train": args.max_train, "dev": args.max_dev})
        places.append(Place(name, folder, own, base, args.out / "runs"))
    if not base.is_dir():
        pretrain_base(corpus, base, settings)
        say(f"pre-trained: {base}")
    return places


def _write_task(task: Task, folder: Path, limits: dict[str, int]) -> None:
    """Write a task with fewer samples, those of the lowest content hash."""
    folder.mkdir(parents=True)
    for name, split in task.splits.items():
        kept = limit_split(split, limits[name]) if name in limits else split
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(task, kept)))


def _rows(task: Task, split: Split) -> list[dict]:
    labels = split.labels if task.regression else [task.label_names[label] for label in split.labels]
    if split.pairs is None:
        return [{"text": text, "label": label} for text, label in zip(split.texts, labels, strict=True)]
    both = zip(split.texts, split.pairs, labels, strict=True)
    return [{"text_a": first, "text_b": second, "label": label} for first, second, label in both]


def _identity(args: argparse.Namespace, settings: Settings) -> dict:
    """Return what may not change between records."""
    limits = {"max_train": args.max_train, "max_dev": args.max_dev, "vocabulary": args.vocabulary}
    return {"tasks": args.tasks.name, **limits, **asdict(settings)}


if __name__ == "__main__":
    sys.exit(main())
