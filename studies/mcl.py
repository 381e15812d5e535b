#!/usr/bin/env python3
"""Do courses, self-correction and soups help ELECTRA? At equal steps, and at equal compute.

A small ELECTRA is pre-trained on MLM, on replaced tokens alone, with MCL's courses, with self-correction, and as a soup
of models trained under different mixes of the courses (studies/mcl.yaml), then fine-tuned on every end task. At equal
steps the dearer arms spend more; at equal compute all have the FLOPs of ELECTRA, and the steps that these pay for. The
models of a soup share either. Settings are to be chosen on seeds that are not reported: --first-seed 100 with another
--out.

    python studies/mcl.py [--text FILE] [--tasks FOLDER] [--seeds 3] [--out FOLDER] [--results FILE] [--quick]

FOLDER has a folder for each task: train, dev and test files. What is done is kept, record by record: the same command
goes on where it stopped, and more seeds or arms are added to it.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script; when it is imported they are there

from benchmarks.common import environment  # noqa: E402
from pretrain.data.embedded import write_corpus  # noqa: E402
from pretrain.data.prepare import prepare  # noqa: E402
from pretrain.data.store import Store  # noqa: E402
from pretrain.data.tasks import load_task  # noqa: E402
from studies import mcl_report, records, reporting  # noqa: E402
from studies.command import add_settings, exit_code, names, say, settings_of  # noqa: E402
from studies.mcl_arms import Arm, Place, Settings, flops_per_token, pretrain, read_arms, score, steps_of  # noqa: E402
from studies.planting import excerpts, write_texts  # noqa: E402
from studies.presence_arms import limited  # noqa: E402
from studies.tartan_arms import FAMILY  # noqa: E402

AGAINST = "electra"
QUICK = Settings(hidden=64, layers=1, steps=4, batch_rows=2, tune_epochs=1, tune_samples=20)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(
        "--text", type=Path, metavar="FILE", help="text or JSON lines, compressed or not (default: the embedded corpus)"
    )
    add("--tasks", type=Path, metavar="FOLDER", help="a folder for each task (default: that of the embedded corpus)")
    add("--only", metavar="NAMES", help="tasks to score (default: all that FOLDER has)")
    add("--megabytes", type=float, default=8.0, metavar="MB", help="of the text that is trained on")
    add("--vocabulary", type=int, default=4096, metavar="N", help="entries of the tokenizer that is trained")
    add("--config", type=Path, default=ROOT / "studies" / "mcl.yaml", metavar="FILE", help="the arms")
    add("--arms", metavar="NAMES", help="arms to run (default: all that FILE has)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first seed; 100 and above are for pilots")
    add("--seeds", type=int, default=3, metavar="N", help="number of seeds")
    add("--out", type=Path, default=ROOT / "runs" / "studies" / "mcl", metavar="FOLDER", help="working folder")
    add("--results", type=Path, metavar="FILE", help="name of the results without suffix (default: OUT/results)")
    add("--quick", action="store_true", help="a model and a budget that show only that it runs")
    add_settings(parser, Settings())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the study; return the exit code."""
    return exit_code(study, parser().parse_args(argv))


def study(args: argparse.Namespace) -> list[Path]:
    """Do what is left of the study; return the files of results."""
    known = read_arms(args.config)
    wanted = names(args.arms or ",".join(known), known, "arm", "--arms")
    settings = settings_of(args, QUICK if args.quick else Settings())
    logging.disable_progress_bar()
    at = _prepare(args, known, settings)
    costs = _costs(args.out, known, at, settings)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [(seed, arm, budget) for seed in seeds for arm in wanted for budget in known[arm].budgets]
    for number, (seed, arm, budget) in enumerate(runs, 1):
        key = {"arm": arm, "budget": budget, "seed": seed}
        left = [task for task in at.tasks if not records.has(args.out, task=task, **key)]
        if not left:
            continue
        model = pretrain(arm, known[arm], budget, steps_of(arm, budget, known, costs, settings), seed, at, settings)
        told = []
        for task in left:
            record = score(model, task, seed, at, settings)
            records.add(args.out, key | record)
            told.append(f"{task} {100 * record['dev']:.1f}")
        shutil.rmtree(model)
        done = f"{number} of {len(runs)}: seed {seed}, {arm}, equal {budget}, {record['steps']} steps"
        say(f"{done}: {', '.join(told)} (dev, %)")
    return report(args, known, at, settings, costs)


def report(
    args: argparse.Namespace, arms: dict[str, Arm], at: Place, settings: Settings, costs: dict[str, float]
) -> list[Path]:
    """Write and print the results of all records that there are."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    done = [record for record in records.read(args.out) if record["seed"] in seeds and record["task"] in at.tasks]
    rows = mcl_report.summarise(done, {name: arm.title for name, arm in arms.items()}, AGAINST)
    where, meta = environment(), Store(at.corpus / "train").meta
    result = {
        "environment": where,
        "settings": _identity(args, arms, settings),
        "samples": meta["samples"],
        "tokens": meta["tokens"],
        "flops_per_token": costs,
        "records": done,
    }
    note = (
        f"{'Given text' if args.text else 'Embedded corpus'}: {meta['samples']:,} samples, {meta['tokens']:,} tokens. "
        f"{FAMILY}, {settings.layers} × {settings.hidden}, steps of {settings.batch_rows} packed rows of "
        f"{settings.row_length} tokens; fine-tuning on at most {settings.tune_samples} samples of a task, "
        f"{settings.tune_epochs} epochs. Equal compute is that of {AGAINST} at equal steps, in FLOPs of forward and "
        "backward passes; the models of a soup share steps or compute, and the table tells how many steps each has. "
        "Test in percent, mean ± sd over seeds; differences seed by seed, and for how many seeds they are above "
        f"0. {where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load']}, torch "
        f"{where['versions']['torch']}, {where['date'][:10]}."
    )
    text = f"{note}\n\n{mcl_report.markdown(rows, AGAINST)}"
    path = args.results or args.out / "results"
    files = reporting.write(path.parent, path.name, text, rows, result, mcl_report.plot)
    print(files[0].read_text(), end="")
    return files


def _prepare(args: argparse.Namespace, arms: dict[str, Arm], settings: Settings) -> Place:
    """Prepare the corpus and load the tasks; refuse a folder with another study's."""
    embedded, text, corpus = args.out / "embedded", args.out / "text.jsonl", args.out / "corpus"
    folders = {path.parent.name: path.parent for path in sorted(args.tasks.glob("*/train.*"))} if args.tasks else {}
    wanted = names(args.only or ",".join(folders), folders, "task", f"--tasks {args.tasks}") if args.tasks else []
    records.claim(args.out, _identity(args, arms, settings))
    if not embedded.is_dir() and None in (args.text, args.tasks):
        write_corpus(embedded, args.megabytes)
    if not corpus.is_dir():
        write_texts(excerpts(args.text or embedded / "corpus.jsonl", args.megabytes), text)
        prepare([text], corpus, vocabulary=args.vocabulary, heldout=0, max_length=settings.max_length, workers=1)
    sources = {name: folders[name] for name in wanted} or {"embedded": embedded / "task"}
    tasks = {name: limited(load_task(source), settings) for name, source in sources.items()}
    return Place(corpus, tasks, args.out / "runs")


def _costs(folder: Path, arms: dict[str, Arm], at: Place, settings: Settings) -> dict[str, float]:
    """Return arm → FLOPs of its training a token; counted once."""
    file = folder / "costs.json"
    if not file.is_file():
        file.write_text(json.dumps(flops_per_token(arms, at, settings), indent=1) + "\n")
    return json.loads(file.read_text())


def _identity(args: argparse.Namespace, arms: dict[str, Arm], settings: Settings) -> dict:
    """Return what may not change between records."""
    paths = {name: vars(args)[name] and vars(args)[name].name for name in ("text", "tasks")}
    numbers = {"megabytes": args.megabytes, "vocabulary": args.vocabulary}
    return {**paths, **numbers, **asdict(settings), "arms": {name: arm.model_dump() for name, arm in arms.items()}}


if __name__ == "__main__":
    sys.exit(main())
