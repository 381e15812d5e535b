"""``medley filter``: a view of a prepared corpus without the samples of the highest scores."""

import argparse
from pathlib import Path

import numpy as np

from pretrain import __version__
from pretrain.data.output import whole_folder
from pretrain.data.store import Store
from pretrain.data.view import write_view
from pretrain.errors import UserError
from pretrain.influence.sequential.scores import Scores

MARKS = ("tokenizer", "train/meta.json", "train/index.npy")  # of a view; one with tokens of its own is no view


def filter_corpus(corpus: str | Path, name: str, keep: float, out: str | Path, overwrite: bool = False) -> dict:
    """Write the view ``out`` of the samples of a prepared corpus that have the lowest scores; ``heldout`` stays whole.

    Of equal scores the earlier samples are kept. Samples keep their order.

    Args:
        corpus: a prepared corpus, or a view of one.
        name: of scores that ``medley score`` has made for it.
        keep: fraction of the samples to keep, rounded to the nearest number, at least one.
        overwrite: replace ``out`` if it is a view.

    Returns:
        ``samples`` and ``tokens`` kept, those there ``were``, and the lowest score that was dropped, ``threshold``.

    Raises:
        UserError: for whatever the user can mend.
    """
    corpus, out = Path(corpus), Path(out)
    if not 0 < keep <= 1:
        raise UserError(f"--keep {keep:g}: must be above 0 and at most 1")
    if not (corpus / "train" / "meta.json").is_file():
        raise UserError(f"{corpus}: no prepared corpus: it has no store 'train'; make one with medley prepare")
    store = Store(corpus / "train")
    scores = Scores(store, name)
    if not len(store):
        raise UserError(f"{corpus}: has no sample to keep")
    if overwrite and any((out / "train").glob("tokens*.bin")):
        raise UserError(f"{out}: holds tokens of its own and is no view; choose another --out")
    order = np.argsort(scores.values, kind="stable")
    kept = np.sort(order[: max(1, round(keep * len(store)))])
    dropped = order[len(kept) :]
    threshold = float(scores.values[dropped[0]]) if len(dropped) else None
    made = {"scores": name, "keep": keep, "threshold": threshold, "scored_by": scores.made_by}
    with whole_folder(out, overwrite, MARKS) as partial:
        write_view(partial, corpus, kept, out, filter=made, program=f"medley {__version__}")
    tokens = int(store.lengths[kept].sum())
    were = {"samples": len(store), "tokens": int(store.meta["tokens"])}
    return {"samples": len(kept), "tokens": tokens, "were": were, "threshold": threshold}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``medley filter``."""
    parser.add_argument("corpus", metavar="CORPUS", help="prepared corpus, or a view of one")
    parser.add_argument("--scores", required=True, metavar="NAME", help="what medley score has made")
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--keep", type=float, metavar="FRACTION", help="of the samples, those of the lowest scores")
    choice.add_argument("--drop-highest", type=float, metavar="FRACTION", help="of the samples; the rest is kept")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the view goes")
    parser.add_argument("--overwrite", action="store_true", help="replace a view")


def run(args: argparse.Namespace) -> None:
    """Run ``medley filter`` and print what it kept."""
    if args.drop_highest is not None and not 0 <= args.drop_highest < 1:
        raise UserError(f"--drop-highest {args.drop_highest:g}: must be at least 0 and below 1")
    keep = args.keep if args.drop_highest is None else 1 - args.drop_highest
    summary = filter_corpus(args.corpus, args.scores, keep, args.out, args.overwrite)
    were, threshold = summary["were"], summary["threshold"]
    print(f"kept {summary['samples']:,} of {were['samples']:,} samples, ", end="")
    print(f"{summary['tokens']:,} of {were['tokens']:,} tokens → {args.out}")
    if threshold is not None:
        print(f"dropped: scores from {threshold:.4g} on")
