#!/usr/bin/env python3
"""Do learnt masks help? Intermediate training under several masking policies, then closed-book cloze questions.

A small ModernBERT is pre-trained with random masks on the passages of a text that hold a name, trained on under a
policy, and fine-tuned on half of the questions (studies/cloze.py); the other half, whose passages were in the corpus
like all others, is scored. Which mask is right is known here: the answers', which the oracle marks. The seed decides
masks and order in intermediate training and fine-tuning; the pre-trained model and the learnt policies are made once
and shared by all seeds. Settings are to be chosen on the questions of "dev", whose scores are shown while it runs.

    python studies/masking.py [--text FILE] [--seeds 5] [--out FOLDER] [--size tiny|small]

What is done is kept in the folder: the same command goes on where it stopped, and more seeds or arms are added to it.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script; when it is imported they are there

from benchmarks.common import environment  # noqa: E402
from pretrain.data.embedded import write_corpus  # noqa: E402
from pretrain.data.prepare import prepare  # noqa: E402
from pretrain.data.store import Store  # noqa: E402
from pretrain.data.tokenization import load_tokenizer  # noqa: E402
from pretrain.errors import RunError  # noqa: E402
from studies import records, reporting  # noqa: E402
from studies.cloze import PARTS, Fact, detokenizer, find_facts, keep_passages, read_facts  # noqa: E402
from studies.cloze_models import (  # noqa: E402
    Settings,
    as_row,
    build_parts,
    fine_tune,
    mask_statistics,
    pretrain,
    recipe_of,
    score,
)
from studies.command import exit_code, names, say, settings_of  # noqa: E402
from studies.mask_arms import ARMS, Workplace, make_annotation  # noqa: E402
from studies.models import save_model  # noqa: E402

AGAINST = "random"
PASSAGE_TOKENS = 64


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    default = Settings()
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="text or JSON lines (default: the embedded corpus)")
    add("--megabytes", type=float, default=0.5, metavar="MB", help="of the embedded corpus")
    add("--vocabulary", type=int, default=2048, metavar="N", help="entries of the tokenizer that is trained")
    add("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N − 1")
    add("--arms", default=",".join(ARMS), metavar="NAMES", help="policies to run")
    add("--out", type=Path, default=ROOT / "runs" / "studies" / "masking", metavar="FOLDER", help="working folder")
    add("--results", type=Path, metavar="FILE", help="name of the results without suffix (default: OUT/results)")
    add("--size", choices=("tiny", "small"), default=default.size, help="of the ModernBERT")
    add("--base-steps", type=int, default=default.base_steps, metavar="N", help="of pre-training")
    add("--steps", type=int, default=default.steps, metavar="N", help="of intermediate training")
    add("--tune-steps", type=int, default=default.tune_steps, metavar="N", help="of fine-tuning on questions")
    add("--learn-steps", type=int, default=150, metavar="N", help="of learning a policy, supervised")
    add("--meta-steps", type=int, default=100, metavar="N", help="of learning a policy by the meta-gradient")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the study; return the exit code."""
    return exit_code(study, parser().parse_args(argv))


def study(args: argparse.Namespace) -> list[Path]:
    """Do what is left of the study; return the files of results."""
    wanted, settings = names(args.arms, ARMS, "arm", "--arms"), settings_of(args, Settings())
    facts = _prepare(args, settings)
    at = Workplace(args.out, facts, args.learn_steps, args.meta_steps)
    base = _base(at, settings)
    made: dict[str, str] = {}
    for name in wanted:
        if ARMS[name].annotation:
            made[name] = _try_to_make(name, at)
    for seed in range(args.seeds):
        for name in wanted:
            if not made.get(name) and not records.has(at.folder, arm=name, seed=seed):
                record = run_arm(name, seed, at, settings, base)
                records.add(at.folder, record)
                say(f"seed {seed}, {name}: exact match on dev {100 * record['dev']['exact_match']:.1f} %")
    return report(args, at, settings, {name: reason for name, reason in made.items() if reason})


def run_arm(name: str, seed: int, at: Workplace, settings: Settings, base: dict[str, torch.Tensor]) -> dict:
    """Train, fine-tune and score one policy with one seed; return its record."""
    began, arm = time.perf_counter(), ARMS[name]
    masking = {"rate": settings.rate, **(arm.masking or {})}
    parts = build_parts(recipe_of(at.corpus, settings, seed, 1, masking), base)
    loss, masks = None, None
    if arm.masking is not None:
        masks = as_row(mask_statistics(parts, at.of("test")))
        loss = pretrain(parts, settings.steps, settings.lr)
    before = score(parts, at.of("test"))
    tuned = fine_tune(parts, at.of("train"), settings, seed)
    return {
        "arm": name,
        "seed": seed,
        "score": as_row(score(parts, at.of("test"))),
        "dev": as_row(score(parts, at.of("dev"))),
        "before_tuning": as_row(before),
        "masks": masks,
        "loss": loss,
        "tuning_loss": tuned,
        "seconds": time.perf_counter() - began,
    }


def report(args: argparse.Namespace, at: Workplace, settings: Settings, failed: dict[str, str]) -> list[Path]:
    """Write and print the results of all records that there are."""
    done = [record for record in records.read(at.folder) if record["seed"] < args.seeds]
    counts = Counter(fact.part for fact in at.facts)
    commonest = Counter(fact.answer for fact in at.of("train")).most_common(1)[0][0]
    test = at.of("test")
    rows = reporting.summarise(done, {name: arm.title for name, arm in ARMS.items()}, AGAINST)
    result = {
        "environment": environment(),
        "settings": asdict(settings) | {"learn_steps": at.learn_steps, "meta_steps": at.meta_steps},
        "text": "given" if args.text else f"embedded corpus, {args.megabytes} MB",
        "passages": len(at.store),
        "tokens": int(at.store.meta["tokens"]),
        "questions": {part: counts[part] for part in PARTS},
        "answers": len({fact.answer for fact in at.facts}),
        "commonest_answer": sum(fact.answer == commonest for fact in test) / len(test),
        "failed": failed,
        "records": done,
    }
    where = result["environment"]
    machine = f"{where['cpu']}, {where['threads']} of {where['cores']} cores, load {where['load']}"
    note = (
        f"{result['text'].capitalize()}: {result['passages']:,} passages, {result['tokens']:,} tokens; "
        f"{counts['train']} questions to fine-tune on, {counts['test']} to score, {result['answers']} answers; always "
        f"the commonest one: {100 * result['commonest_answer']:.1f} %. ModernBERT {settings.size}, "
        f"{settings.base_steps} steps of pre-training, {settings.steps} under the policy, {settings.tune_steps} of "
        "fine-tuning. Mean ± sd over seeds; differences seed by seed, and how many are above 0. "
        f"{machine}, torch {where['versions']['torch']}, {where['date'][:10]}."
    )
    path = args.results or args.out / "results"
    text = f"{note}\n\n{reporting.markdown(rows, AGAINST)}"
    files = reporting.write(path.parent, path.name, text, rows, result, reporting.plot)
    print(files[0].read_text(), end="")
    return files


def _prepare(args: argparse.Namespace, settings: Settings) -> list[Fact]:
    """Prepare the corpus and find the facts; refuse a folder with another study's."""
    names = (
        "text",
        "megabytes",
        "vocabulary",
        "size",
        "base_steps",
        "steps",
        "tune_steps",
        "learn_steps",
        "meta_steps",
    )
    identity = {name: str(vars(args)[name]) for name in names} | {"settings": json.dumps(asdict(settings))}
    records.claim(args.out, identity)
    corpus, whole = args.out / "corpus", args.out / "whole"
    if corpus.is_dir():
        return read_facts(corpus)
    if not whole.is_dir():
        text = args.text
        if text is None:
            folder = args.out / "embedded"
            if not folder.is_dir():
                write_corpus(folder, args.megabytes)
            text = folder / "corpus.jsonl"
        prepare([text], whole, heldout=0, max_length=PASSAGE_TOKENS, vocabulary=args.vocabulary)
    store = Store(whole / "train")
    return keep_passages(store, find_facts(store, detokenizer(load_tokenizer(whole / "tokenizer"))), corpus)


def _base(at: Workplace, settings: Settings) -> dict[str, torch.Tensor]:
    """Pre-train the model that all arms begin with, unless it is there; return its weights."""
    file = at.folder / "base.pt"
    if not file.is_file():
        parts = build_parts(recipe_of(at.corpus, settings, 0, 0, {"rate": settings.rate}))
        say(f"pre-trained: loss {pretrain(parts, settings.base_steps, settings.base_lr):.3f}")
        save_model(parts, at.base)
        torch.save(parts.model.state_dict(), file)
    return torch.load(file, weights_only=True)


def _try_to_make(name: str, at: Workplace) -> str:
    """Make an arm's annotation; return why it cannot be, if so: the arm is then told as not run."""
    try:
        make_annotation(name, at)
        return ""
    except (RunError, ImportError) as error:
        say(f"{name}: not run: {error}")
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
