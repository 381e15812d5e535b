"""``medley prepare``: text to a prepared corpus (a tokenizer and two token stores, see ``store.py``)."""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from pretrain import __version__
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import folder_of
from pretrain.data.annotators import ANNOTATIONS, Annotator, annotators
from pretrain.data.documents import DOCUMENTS, Piece, Reader, Tally
from pretrain.data.output import whole_folder
from pretrain.data.pool import cores, in_order
from pretrain.data.samples import SampleMaker
from pretrain.data.sources import Source, find_sources
from pretrain.data.store_writer import SHARD_MEGABYTES, StoreWriter
from pretrain.data.tokenization import KINDS, barred_ids, frame, load_tokenizer, train_tokenizer
from pretrain.errors import UserError, unknown

BATCH_CHARACTERS = 1 << 18  # handed to a worker at once
TRAINING_CHARACTERS = 1 << 26  # the most text a tokenizer is trained on
SPLITS = ("train", "heldout")
MARKS = ("tokenizer", "train/meta.json", "heldout/meta.json")  # what tells a prepared corpus from another folder
TOO_SHORT = "text too short for a sample"


@dataclass(frozen=True)
class Options:
    """What decides the content of a prepared corpus, apart from its input.

    Attributes:
        field: JSON key or column of the text.
        documents: what a document is in a ``.txt`` file: ``blank_line`` (text between blank lines), ``line``, ``file``.
        dataset_config, dataset_split: of Hugging Face datasets.
        tokenizer: name or path of a Hugging Face tokenizer; None trains one on the text that is not held out,
            at most ``TRAINING_CHARACTERS`` of it.
        train_tokenizer: the kind to train, ``wordpiece`` or ``bpe``.
        vocabulary: entries of a trained tokenizer at most.
        sentinels: how many of the entries of a trained tokenizer stand for spans (``<extra_id_0>``, …), as span
            corruption needs them.
        lowercase: whether a trained ``wordpiece`` tokenizer folds case and strips accents.
        max_length: most tokens in a sample, special tokens included.
        min_length: fewest tokens of text in a sample, special tokens not counted.
        heldout: fraction of documents held out, chosen by the hash of a document's first piece.
        max_bad: largest fraction of documents that may be unreadable.
        annotate: annotations to make of the raw text, names of ``ANNOTATIONS`` with commas between them.
        spacy: name or path of the spaCy model that makes them; None takes the rules.
    """

    field: str = "text"
    documents: str = "blank_line"
    dataset_config: str | None = None
    dataset_split: str = "train"
    tokenizer: str | None = None
    train_tokenizer: str = "wordpiece"
    vocabulary: int = 30522
    sentinels: int = 0
    lowercase: bool = False
    max_length: int = 128
    min_length: int = 8
    heldout: float = 0.01
    max_bad: float = 0.001
    annotate: str = ""
    spacy: str | None = None

    def __post_init__(self):
        if self.documents not in DOCUMENTS:
            raise unknown("value", self.documents, DOCUMENTS, where="--documents")
        if self.train_tokenizer not in KINDS:
            raise unknown("value", self.train_tokenizer, KINDS, where="--train-tokenizer")
        if self.lowercase and (self.tokenizer or self.train_tokenizer != "wordpiece"):
            raise UserError("--lowercase is for a wordpiece tokenizer trained here; leave it out")
        if self.sentinels < 0:
            raise UserError(f"--sentinels {self.sentinels}: must not be negative")
        if self.sentinels and self.tokenizer:
            raise UserError("--sentinels is for a tokenizer trained here; leave it out, or name T5's, which has them")
        if self.min_length < 1:
            raise UserError(f"--min-length {self.min_length}: must be at least 1")
        for name in ("heldout", "max_bad"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0 and below 1")
        if self.spacy and not self.annotate:
            raise UserError("--spacy goes with --annotate; name what to annotate")

    @property
    def annotations(self) -> list[str]:
        """The names in ``annotate``."""
        return [name.strip() for name in self.annotate.split(",") if name.strip()]


@dataclass
class Counts:
    """What one split was given, before it was cut into samples; ``too_short`` texts gave none."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    too_short: int = 0


def prepare(
    inputs: Iterable[str | Path],
    out: str | Path,
    workers: int | None = None,
    overwrite: bool = False,
    shard_megabytes: float = SHARD_MEGABYTES,
    **options,
) -> dict:
    """Turn text into the prepared corpus ``out``.

    Args:
        inputs: files, folders, globs, or ``hf:NAME_OR_PATH`` for a Hugging Face dataset.
        workers: number of processes, by default one a core. The result does not depend on it.
        overwrite: replace ``out`` if it is a prepared corpus.
        shard_megabytes: most of a file of tokens, in 10⁶ bytes. Nothing else depends on it.
        options: fields of :class:`Options`.

    Returns:
        The summary: ``documents, samples, tokens`` {split: count}; ``characters, bytes`` of text; ``skipped``
        {kind: count}; ``seconds``.

    Raises:
        UserError: for whatever the user can mend; nothing is left behind then.
        RuntimeError: if a worker process dies.
    """
    if options.get("tokenizer") is not None:
        options["tokenizer"] = str(options["tokenizer"])
    settings = Options(**options)
    inputs = [str(name) for name in inputs]
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if not 0 < shard_megabytes < float("inf"):
        raise UserError(f"--shard-megabytes {shard_megabytes:g}: must be above 0")
    sources, passed_over = find_sources(inputs)
    if passed_over:
        _say(f"passed over {len(passed_over):,} files with other suffixes, such as {passed_over[0]}")
    makers = annotators(settings.annotations, settings.spacy, "--annotate")
    made_by = {annotator.name: annotator.made_by("raw") for annotator in makers}
    for line in filter(None, (annotator.misses for annotator in makers)):
        _say(line)
    began = time.monotonic()
    with whole_folder(out, overwrite, MARKS) as folder:
        vocabulary_size, maker = _make_tokenizer(sources, settings, folder / "tokenizer", makers)
        writers = {split: StoreWriter(folder / split, vocabulary_size, shard_megabytes) for split in SPLITS}
        units = {
            (split, one.name): AnnotationWriter(folder_of(writers[split], one.name), one.kind, made_by[one.name])
            for split in SPLITS
            for one in makers
        }
        counts = {split: Counts() for split in SPLITS}
        tally = Tally(settings.max_bad, settings.field, _say)
        reader = _reader(sources, settings)
        _write_samples(reader, tally, maker, writers, units, counts, settings, workers or cores())
        skipped = dict(tally.skipped)
        if too_short := sum(count.too_short for count in counts.values()):
            skipped[TOO_SHORT] = too_short
        if not writers["train"].samples:
            told = ", ".join(f"{count:,} × {kind}" for kind, count in skipped.items()) or "all of it is held out"
            raise UserError(f"no sample for training in {tally.documents:,} documents ({told}); more text is needed")
        for split, writer in writers.items():
            writer.close(
                tokenizer={
                    "path": "../tokenizer",
                    "sha256": hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
                    "vocabulary_size": vocabulary_size,
                    "before": list(maker.before),
                    "after": list(maker.after),
                },
                source={"inputs": inputs, "files": len(sources), "options": asdict(settings)},
                **asdict(counts[split]),
                report={"skipped": skipped, "examples": tally.examples, "passed_over": len(passed_over)},
                program=f"medley {__version__}",
            )
        for (split, _), annotation in units.items():
            annotation.finish(writers[split].fingerprint)
            annotation.publish()
    return {
        "documents": {split: count.documents for split, count in counts.items()},
        "samples": {split: writer.samples for split, writer in writers.items()},
        "tokens": {split: writer.token_count for split, writer in writers.items()},
        "characters": sum(count.characters for count in counts.values()),
        "bytes": sum(count.bytes for count in counts.values()),
        "skipped": skipped,
        "seconds": time.monotonic() - began,
    }


def _reader(sources: list[Source], settings: Options) -> Reader:
    return Reader(sources, settings.field, settings.documents, settings.dataset_config, settings.dataset_split)


def _make_tokenizer(
    sources: list[Source], settings: Options, folder: Path, makers: tuple[Annotator, ...]
) -> tuple[int, SampleMaker]:
    """Load or train the tokenizer and save it; return its vocabulary's size and what makes samples with it."""
    if settings.tokenizer:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        _say(f"training a {settings.train_tokenizer} tokenizer of up to {settings.vocabulary:,} entries")
        quiet = Tally(1, settings.field, say=lambda line: None)  # the text is read again, and reported then

        def sample() -> Iterator[str]:
            pieces = _reader(sources, settings).sample(TRAINING_CHARACTERS, quiet)
            return (text for text, split, _ in _divided(pieces, settings.heldout) if split == "train")

        tokenizer = train_tokenizer(
            sample,
            settings.train_tokenizer,
            settings.vocabulary,
            settings.lowercase,
            settings.max_length,
            settings.sentinels,
        )
    tokenizer.save_pretrained(folder)
    before, after = frame(tokenizer)
    barred = barred_ids(tokenizer)
    capacity = settings.max_length - len(before) - len(after)
    if capacity < 2 * settings.min_length:
        raise UserError(
            f"--max-length {settings.max_length}: leaves {capacity} tokens of text, which must be at least twice "
            f"--min-length {settings.min_length}"
        )
    unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id not in barred else None
    file = str(folder / "tokenizer.json")
    maker = SampleMaker(
        tokenizer_file=file,
        before=tuple(before),
        after=tuple(after),
        barred=frozenset(barred),
        unknown=unknown_id,
        capacity=capacity,
        minimum=settings.min_length,
        annotators=makers,
    )
    return len(tokenizer), maker


def _divided(pieces: Iterable[Piece], heldout: float) -> Iterator[tuple[str, str, bool]]:
    """Yield (text, split, whether it begins a document); a document's first piece decides for the whole of it."""
    split = "train"
    for text, first in pieces:
        if first:
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
            split = "heldout" if number < heldout * 2**64 else "train"
        yield text, split, first


def _batches(pieces: Iterable[Piece], heldout: float, counts: dict[str, Counts]) -> Iterator[tuple[str, list[str]]]:
    """Yield (split, texts) of about ``BATCH_CHARACTERS``; ``counts`` are brought up to date."""
    held: dict[str, list[str]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for text, split, first in _divided(pieces, heldout):
        counts[split].documents += first
        counts[split].characters += len(text)
        counts[split].bytes += len(text) if text.isascii() else len(text.encode())
        held[split].append(text)
        size[split] += len(text)
        if size[split] >= BATCH_CHARACTERS:
            yield split, held[split]
            held[split], size[split] = [], 0
    yield from ((split, texts) for split, texts in held.items() if texts)


def _write_samples(
    reader: Reader,
    tally: Tally,
    maker: SampleMaker,
    writers: dict[str, StoreWriter],
    units: dict[tuple[str, str], AnnotationWriter],
    counts: dict[str, Counts],
    settings: Options,
    workers: int,
) -> None:
    """Read, tokenise and write everything, showing how far it is."""
    batches = _batches(reader.pieces(tally), settings.heldout, counts)
    with tqdm(total=reader.total_bytes, unit="B", unit_scale=True, disable=None, desc="preparing") as bar:
        for split, samples in in_order(maker.start, batches, workers):
            writers[split].append(samples.tokens, samples.lengths)
            for name, its in samples.units.items():
                units[split, name].append(its, samples.lengths)
            counts[split].too_short += samples.too_short
            bar.update(reader.position - bar.n)
        bar.update(reader.position - bar.n)
    tally.check()


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``medley prepare``."""
    default = {field.name: field.default for field in fields(Options)}
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file (.txt .jsonl, also .gz .xz .zst; .parquet), folder, glob, or hf:NAME_OR_PATH of a dataset",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the prepared corpus goes")
    add = parser.add_argument_group("reading").add_argument
    add("--field", metavar="NAME", help="JSON key or column of the text (default: %(default)s)")
    add("--documents", choices=DOCUMENTS, help="what a document is in .txt files (default: %(default)s)")
    add("--dataset-config", metavar="NAME", help="configuration of a Hugging Face dataset")
    add("--dataset-split", metavar="NAME", help="split of a Hugging Face dataset (default: %(default)s)")
    add("--max-bad", type=float, metavar="FRACTION", help="of documents that may be unreadable (default: %(default)s)")
    group = parser.add_argument_group("tokenizer")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="a Hugging Face tokenizer")
    choice.add_argument("--train-tokenizer", choices=KINDS, help="train one on the text (default: %(default)s)")
    group.add_argument("--vocabulary", type=int, metavar="N", help="entries of a trained one (default: %(default)s)")
    group.add_argument(
        "--sentinels", type=int, metavar="N", help="of them stand for spans, for T5's objective (default: %(default)s)"
    )
    group.add_argument("--lowercase", action="store_true", help="train one that folds case (wordpiece)")
    add = parser.add_argument_group("samples").add_argument
    add("--max-length", type=int, metavar="TOKENS", help="of a sample, specials included (default: %(default)s)")
    add("--min-length", type=int, metavar="TOKENS", help="of text in a sample (default: %(default)s)")
    add("--heldout", type=float, metavar="FRACTION", help="of documents to hold out (default: %(default)s)")
    add = parser.add_argument_group("annotations").add_argument
    add("--annotate", metavar="NAMES", help=f"of {', '.join(ANNOTATIONS)}, with commas: made of the raw text")
    add("--spacy", metavar="MODEL", help="makes them with a spaCy model (default: by rules)")
    add = parser.add_argument_group("running").add_argument
    add("--workers", type=int, metavar="N", help="processes (default: one a core); the result is the same")
    add("--overwrite", action="store_true", help="replace a prepared corpus")
    add(
        "--shard-megabytes",
        type=float,
        default=SHARD_MEGABYTES,
        metavar="N",
        help="most of a file of tokens, in 10^6 bytes (default: %(default)g)",
    )
    parser.set_defaults(**default)


def run(args: argparse.Namespace) -> None:
    """Run ``medley prepare`` and print its summary."""
    options = {field.name: getattr(args, field.name) for field in fields(Options)}
    summary = prepare(args.inputs, args.out, args.workers, args.overwrite, args.shard_megabytes, **options)
    documents, samples, tokens = (summary[name] for name in ("documents", "samples", "tokens"))
    print(f"{'':9}{'documents':>14}{'samples':>14}{'tokens':>16}{'tokens/sample':>15}")
    for split in SPLITS:
        mean = tokens[split] / max(samples[split], 1)
        print(f"{split:9}{documents[split]:14,}{samples[split]:14,}{tokens[split]:16,}{mean:15.1f}")
    for kind, count in summary["skipped"].items():
        print(f"skipped {count:,} × {kind}")
    if not samples["heldout"]:
        print("nothing is held out: give more text or a larger --heldout")
    megabytes = summary["bytes"] / 1e6
    seconds = summary["seconds"]
    print(f"{megabytes:,.1f} MB of text in {seconds:,.1f} s ({megabytes / seconds:.1f} MB/s) → {args.out}")
