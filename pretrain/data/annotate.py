"""``medley annotate``: annotations of a corpus that is prepared already, made of the text its tokens stand for.

What else makes annotations of a store's samples, such as a learnt policy, uses :func:`annotate_stores` too.
"""

import argparse
import errno
import hashlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from pretrain.data.alignment import Detokenizer, numbered_spans, sample_units
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import folder_of
from pretrain.data.annotators import ANNOTATIONS, Annotator, annotators
from pretrain.data.pool import cores, in_order
from pretrain.data.store import Store
from pretrain.data.tokenization import barred_ids, load_tokenizer
from pretrain.errors import UserError, unknown

BATCH_TOKENS = 1 << 16  # handed to a worker at once
SPLITS = ("train", "heldout")
LEARNED = "learned"
_OPTIONS_OF_LEARNED = ("model", "top_k", "max_span", "called")

UnitSource = Callable[[Store, int], Iterator[tuple[np.ndarray, np.ndarray]]]
"""(store, first sample) → (units, lengths) of all samples from there on, in parts that a writer takes."""


@dataclass(frozen=True)
class UnitMaker:
    """Annotates samples of a store. Plain data, so that it can be sent to a process.

    Args:
        store: folder of the store.
        tokenizer_file: path of its ``tokenizer.json``.
        barred: ids that are no text and in no unit.
    """

    store: Path
    tokenizer_file: str
    barred: frozenset[int]
    annotator: Annotator

    def start(self) -> Callable[[tuple[int, int]], tuple[np.ndarray, np.ndarray]]:
        """Open store and tokenizer; return the function (first sample, one behind the last) → (units, lengths)."""
        store = Store(self.store)
        text_of = Detokenizer(Tokenizer.from_file(self.tokenizer_file), self.barred)
        mark = self.annotator.start()

        def work(samples: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
            ids = store.samples(slice(*samples))
            texts = [text_of(sample) for sample in ids]
            marked = mark([found.text for found in texts])
            units = []
            for sample, found, marks in zip(ids, texts, marked, strict=True):
                numbers = np.where(text_of.is_text[sample], numbered_spans(found, marks), -1)
                units.append(sample_units(self.annotator.kind, numbers, marks))
            return np.concatenate(units), store.lengths[slice(*samples)]

        return work


def annotate(
    corpus: str | Path, name: str, spacy: str | None = None, workers: int | None = None, overwrite: bool = False
) -> dict:
    """Annotate the stores of a prepared corpus; an interrupted annotation goes on where it stopped.

    Args:
        corpus: folder that ``medley prepare`` wrote.
        name: one of ``ANNOTATIONS``.
        spacy: name or path of a spaCy model; None takes the rules.
        workers: number of processes, by default one a core. The result does not depend on it.
        overwrite: replace the annotation, if the stores have it.

    Returns:
        The summary of :func:`annotate_stores`.

    Raises:
        UserError: for whatever the user can mend.
        RuntimeError: if a worker process dies.
    """
    corpus = Path(corpus)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    (annotator,) = annotators([name], spacy, "NAME")
    stores = prepared_stores(corpus)
    tokenizer_file, barred = _tokenizer(corpus / "tokenizer", stores["train"])
    made_by = annotator.made_by("decoded")
    todo = lacking(stores, name, overwrite)
    if annotator.misses:
        _say(annotator.misses)
    if _folds_case(tokenizer_file):
        _say(
            "the tokenizer folds case: names cannot be told by their capitals; "
            f"'medley prepare --annotate {name}' reads the text itself, capitals and all"
        )

    def units(store: Store, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        maker = UnitMaker(store.folder, tokenizer_file, barred, annotator)
        left = len(store.tokens) - (int(store.offsets[first]) if first < len(store) else 0)
        return in_order(maker.start, chunks(store, first), min(workers or cores(), max(1, left // BATCH_TOKENS)))

    return annotate_stores(todo, name, annotator.kind, made_by, units)


def annotate_stores(stores: dict[str, Store], name: str, kind: str, made_by: dict, units: UnitSource) -> dict:
    """Write an annotation of stores of one corpus, all of them or none; an interrupted one goes on where it stopped.

    Args:
        stores: by split.
        name, kind, made_by: of the annotation, see :class:`AnnotationWriter`.
        units: gives the units.

    Returns:
        The summary: ``splits`` {split: counts of samples, tokens, units, samples_without}; ``tokens`` annotated in
        this call, ``seconds``.

    Raises:
        UserError: if the folders cannot be written, or another run is writing there.
    """
    began, done, writers = time.monotonic(), 0, {}
    try:
        for split, store in stores.items():
            writers[split] = AnnotationWriter(folder_of(store, name), kind, made_by, store.fingerprint)
            done -= writers[split].tokens
            _write_units(store, units, writers[split], split)
            done += writers[split].tokens
        for writer in writers.values():
            writer.publish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"{store.folder.parent}: cannot be written ({error.strerror})") from None
        raise
    finally:
        for writer in writers.values():
            writer.close()
    counts = ("samples", "tokens", "units", "samples_without")
    return {
        "splits": {split: {key: getattr(writer, key) for key in counts} for split, writer in writers.items()},
        "tokens": done,
        "seconds": time.monotonic() - began,
    }


def prepared_stores(corpus: Path) -> dict[str, Store]:
    """Return split → store of a prepared corpus."""
    if not (corpus / "train" / "meta.json").is_file():
        parent = corpus.resolve().parent
        hint = f"; did you mean {parent}?" if (parent / "train" / "meta.json").is_file() else ""
        raise UserError(
            f"{corpus}: no prepared corpus: it has no store 'train'{hint or '; make one with medley prepare'}"
        )
    stores = {split: Store(corpus / split) for split in SPLITS if (corpus / split).is_dir()}
    if stores["train"].source is not stores["train"]:
        source = stores["train"].source.folder.resolve().parent
        raise UserError(f"{corpus}: is a view of {source}, whose annotations it has; annotate that")
    return stores


def _tokenizer(folder: Path, store: Store) -> tuple[str, frozenset[int]]:
    """Return the path of the tokenizer's file and the ids that are no text."""
    file = folder / "tokenizer.json"
    expected = store.meta.get("tokenizer", {}).get("sha256")
    if not file.is_file():
        raise UserError(f"{file}: no such file; prepare the corpus again")
    if expected and hashlib.sha256(file.read_bytes()).hexdigest() != expected:
        raise UserError(f"{file}: is not the tokenizer the store was made with; prepare the corpus again")
    return str(file), frozenset(barred_ids(load_tokenizer(folder)))


def lacking(stores: dict[str, Store], name: str, overwrite: bool) -> dict[str, Store]:
    """Return the stores without an annotation of this name, whatever made it, or all of them if it may be overwritten.

    Raises:
        UserError: if there is none.
    """
    todo = {
        split: store
        for split, store in stores.items()
        if overwrite or not (folder_of(store, name) / "meta.json").is_file()
    }
    if not todo:
        raise UserError(f"{folder_of(stores['train'], name)}: exists already; give --overwrite to make it again")
    return todo


def _folds_case(tokenizer_file: str) -> bool:
    normalizer = Tokenizer.from_file(tokenizer_file).normalizer
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def _write_units(store: Store, source: UnitSource, writer: AnnotationWriter, split: str) -> None:
    """Annotate what is left of one store, showing how far it is; however it ends, what is done is saved."""
    if writer.samples:
        _say(f"{split}: going on after {writer.samples:,} of {len(store):,} samples")
    try:
        with tqdm(
            total=int(store.meta["tokens"]),
            initial=writer.tokens,
            unit="token",
            unit_scale=True,
            disable=None,
            desc=f"annotating {split}",
        ) as bar:
            for units, lengths in source(store, writer.samples):
                writer.append(units, lengths)
                bar.update(len(units))
    except BaseException:
        writer.save()
        _say(
            f"{split}: stopped after {writer.samples:,} of {len(store):,} samples; the same command goes on from there"
        )
        raise
    writer.finish()


def chunks(store: Store, first: int) -> Iterator[tuple[int, int]]:
    """Yield (first sample, one behind the last) of about ``BATCH_TOKENS`` each."""
    while first < len(store):
        index = store.index[first : first + BATCH_TOKENS]
        last = first + max(1, int(np.searchsorted(index.sum(axis=1), index[0, 0] + BATCH_TOKENS, side="right")))
        yield first, last
        first = last


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``medley annotate``."""
    parser.add_argument("corpus", metavar="CORPUS", help="folder that medley prepare wrote")
    parser.add_argument(
        "name",
        metavar="NAME",
        help="salient (names, dates, numbers), pos (parts of speech), or learned (spans that a model chooses)",
    )
    parser.add_argument("--spacy", metavar="MODEL", help="use a spaCy model (default: rules)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core); same result")
    parser.add_argument("--overwrite", action="store_true", help="replace an annotation of this name")
    add = parser.add_argument_group("learned").add_argument
    add("--model", metavar="FOLDER", help="the extractor, from medley learn-mask")
    add("--top-k", type=int, metavar="K", help="spans of a sample (default: the extractor's)")
    add("--max-span", type=int, metavar="TOKENS", help="of a span (default: the extractor's)")
    add("--name", dest="called", metavar="NAME", help="of the annotation (default: learned)")


def run(args: argparse.Namespace) -> None:
    """Run ``medley annotate`` and print its summary."""
    if args.name == LEARNED:
        for option in ("spacy", "workers"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} is for annotations of text; leave it out")
        # by name, because learning stands on this floor
        summary = importlib.import_module("pretrain.masking.learning.annotate").annotate_with(args)
    else:
        for option in _OPTIONS_OF_LEARNED:
            if getattr(args, option) is not None:
                told = "name" if option == "called" else option.replace("_", "-")
                raise UserError(f"--{told} goes with '{LEARNED}', not with '{args.name}'")
        if args.name not in ANNOTATIONS:
            raise unknown("annotation", args.name, [*ANNOTATIONS, LEARNED], "NAME")
        summary = annotate(args.corpus, args.name, args.spacy, args.workers, args.overwrite)
    print(f"{'':9}{'samples':>14}{'tokens':>16}{'units':>14}{'without one':>14}")
    for split, counts in summary["splits"].items():
        samples, tokens, units, without = counts.values()
        print(f"{split:9}{samples:14,}{tokens:16,}{units:14,}{without:14,}")
    tokens, seconds = summary["tokens"], summary["seconds"]
    print(f"{tokens:,} tokens in {seconds:,.1f} s ({tokens / seconds:,.0f} tokens/s) → {args.corpus}")
