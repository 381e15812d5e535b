#!/usr/bin/env python3
"""Does it help to weigh samples by their self-influence, and do the scores find bad samples? Text with planted trouble.

A third of the training samples is spoilt: words in random order, text of another domain, many copies of one sample
(studies/planting.py). On it a small ModernBERT, pre-trained on other clean text of the same kind, is trained on with
uniform weights, with PRESENCE (novelty, stability, both stages), with its weights shuffled, and with LinUpper; at equal
steps, and again at equal compute, where the arms whose steps cost more take fewer. Each is told by its loss on clean
held-out text, by the end task that it is fine-tuned on, and by how well scores tell spoilt samples from clean ones as
training goes on. Corpus and pre-trained model are the same for all seeds.

    python studies/presence.py [--text FILE] [--other FILE] [--task FOLDER] [--seeds 5] [--out FOLDER] [--quick]

What is done is kept: the same command goes on where it stopped, and more seeds or arms are added to it. Settings are to
be chosen on seeds that are not reported: --first-seed 100 with another --out.
"""

import argparse
import json
import sys
import time
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
from studies import presence_report, records, reporting  # noqa: E402
from studies.command import add_settings, exit_code, names, say, settings_of  # noqa: E402
from studies.planting import SHARE, TROUBLES, excerpts, plant, source_code, write_texts  # noqa: E402
from studies.presence_arms import (  # noqa: E402
    AGAINST,
    ARMS,
    COMPUTE,
    STEPS,
    Place,
    Settings,
    cost_ratios,
    limited,
    pretrain_base,
    run_arm,
)

HELDOUT = 0.1
"""Of the documents."""
QUICK = Settings(
    base_steps=2,
    steps=3,
    batch_rows=2,
    heldout_rows=2,
    scored_samples=4,
    cost_rounds=1,
    tune_epochs=1,
    tune_samples=20,
)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(
        "--text", type=Path, metavar="FILE", help="text or JSON lines, compressed or not (default: the embedded corpus)"
    )
    add("--other", type=Path, metavar="FILE", help="text of another domain (default: the code of Python's library)")
    add("--task", type=Path, metavar="FOLDER", help="end task (default: that of the embedded corpus)")
    add(
        "--megabytes",
        type=float,
        default=2.0,
        metavar="MB",
        help="of the text that is trained on; as much is pre-trained on",
    )
    add("--trouble", default=",".join(TROUBLES), metavar="NAMES", help="kinds that are planted, an equal part each")
    add("--vocabulary", type=int, default=2048, metavar="N", help="entries of the tokenizer that is trained")
    add("--arms", default=",".join(ARMS), metavar="NAMES", help="arms to run")
    add("--first-seed", type=int, default=0, metavar="N", help="the first seed; 100 and above are for pilots")
    add("--seeds", type=int, default=5, metavar="N", help="number of seeds")
    add("--out", type=Path, default=ROOT / "runs" / "studies" / "presence", metavar="FOLDER", help="working folder")
    add("--results", type=Path, metavar="FILE", help="name of the results without suffix (default: OUT/results)")
    add("--quick", action="store_true", help="a few steps, which show only that it runs")
    add_settings(parser, Settings())
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the study; return the exit code."""
    return exit_code(study, parser().parse_args(argv))


def study(args: argparse.Namespace) -> list[Path]:
    """Do what is left of the study; return the files of results."""
    arms, troubles = names(args.arms, ARMS, "arm", "--arms"), names(args.trouble, TROUBLES, "kind", "--trouble")
    settings = settings_of(args, QUICK if args.quick else Settings())
    logging.disable_progress_bar()
    at = _prepare(args, settings, troubles)
    ratios = _ratios(args.out, at, settings)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in arms:
            for budget in (STEPS,) if arm == AGAINST else (STEPS, COMPUTE):
                if not records.has(args.out, arm=arm, seed=seed, budget=budget):
                    began = time.perf_counter()
                    record = run_arm(arm, budget, seed, ratios[arm], at, settings)
                    records.add(args.out, record | {"seconds": time.perf_counter() - began})
                    say(
                        f"seed {seed}, {arm}, equal {budget}: held-out loss {record['heldout_loss']:.4f}, "
                        f"{record['metric']} on dev {100 * record['dev']:.1f} %"
                    )
    return report(args, at, settings, troubles, ratios)


def report(
    args: argparse.Namespace, at: Place, settings: Settings, troubles: list[str], ratios: dict[str, float]
) -> list[Path]:
    """Write and print the results of all records that there are."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    done = [record for record in records.read(args.out) if record["seed"] in seeds]
    rows = presence_report.summarise(done, {name: arm.title for name, arm in ARMS.items()}, AGAINST)
    where, meta = environment(), Store(at.corpus / "train").meta
    result = {
        "environment": where,
        "settings": _identity(args, settings, troubles),
        "samples": meta["samples"],
        "tokens": meta["tokens"],
        "step_costs": ratios,
        "records": done,
    }
    two = sorted({record["two_passes"] for record in done if record["two_passes"]})
    note = (
        f"{'Given text' if args.text else 'Embedded corpus'}: {meta['samples']:,} samples, {meta['tokens']:,} tokens; "
        f"{100 * SHARE:.0f} % of the samples are spoilt: {', '.join(troubles)}. ModernBERT {settings.size}, "
        f"{settings.base_steps} steps of pre-training on clean text, {settings.steps} steps of an arm, each of "
        f"{settings.batch_rows} packed rows of {settings.row_length} tokens. PRESENCE takes "
        f"{f'two passes ({two[0]})' if two else 'deferred gradients'}. Mean ± sd over seeds; differences seed by seed, "
        "and for how many seeds they are better. "
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load']}, torch "
        f"{where['versions']['torch']}, {where['date'][:10]}."
    )
    text = f"{note}\n\n{presence_report.markdown(rows, done, AGAINST)}"
    path = args.results or args.out / "results"
    files = reporting.write(path.parent, path.name, text, rows, result, presence_report.plot)
    print(files[0].read_text(), end="")
    return files


def _prepare(args: argparse.Namespace, settings: Settings, troubles: list[str]) -> Place:
    """Prepare the corpora and plant the trouble, as far as they are not there; refuse a folder with another study's."""
    records.claim(args.out, _identity(args, settings, troubles))
    texts, embedded = args.out / "texts", args.out / "embedded"
    clean, before, other, corpus = (args.out / name for name in ("clean", "before", "other", "corpus"))
    texts.mkdir(exist_ok=True)
    if not embedded.is_dir() and None in (args.text, args.task):
        write_corpus(embedded, 2 * args.megabytes)
    shape = {"max_length": settings.max_length, "workers": 1}
    if not clean.is_dir():
        parts = list(excerpts(args.text or embedded / "corpus.jsonl", 2 * args.megabytes))
        for name, half in (("clean", parts[::2]), ("before", parts[1::2])):
            write_texts(half, texts / f"{name}.jsonl")
        prepare([texts / "clean.jsonl"], clean, vocabulary=args.vocabulary, heldout=HELDOUT, **shape)
    if not before.is_dir():
        prepare([texts / "before.jsonl"], before, tokenizer=clean / "tokenizer", heldout=HELDOUT, **shape)
    if "foreign" in troubles and not other.is_dir():
        megabytes = SHARE * args.megabytes
        texts_of_other = excerpts(args.other, megabytes) if args.other else source_code(megabytes)
        write_texts(texts_of_other, texts / "other.jsonl")
        prepare([texts / "other.jsonl"], other, tokenizer=clean / "tokenizer", heldout=0, **shape)
    if not corpus.is_dir():
        plant(clean, Store(other / "train") if "foreign" in troubles else None, corpus, troubles)
    base = args.out / "base" if settings.base_steps else None
    if base and not base.is_dir():
        say(f"pre-trained: held-out loss {pretrain_base(before, base, settings):.4f}")
    task = limited(load_task(args.task or embedded / "task"), settings)
    return Place(corpus, base, task, args.out / "runs")


def _ratios(folder: Path, at: Place, settings: Settings) -> dict[str, float]:
    """Return arm → what a step costs in uniform ones; measured once."""
    file = folder / "costs.json"
    if not file.is_file():
        file.write_text(json.dumps(cost_ratios(at, settings), indent=1) + "\n")
    return json.loads(file.read_text())


def _identity(args: argparse.Namespace, settings: Settings, troubles: list[str]) -> dict:
    """Return what may not change between records."""
    paths = {name: vars(args)[name] and vars(args)[name].name for name in ("text", "other", "task")}
    numbers = {"megabytes": args.megabytes, "vocabulary": args.vocabulary}
    return {**paths, **numbers, "troubles": troubles, **asdict(settings)}


if __name__ == "__main__":
    sys.exit(main())
