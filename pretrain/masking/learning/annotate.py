"""``medley annotate CORPUS learned``: the spans of a corpus that a learnt extractor deems worth recovering."""

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pretrain.data.annotate import LEARNED, annotate_stores, chunks, lacking, prepared_stores
from pretrain.data.annotations import NO_UNIT
from pretrain.data.store import Store
from pretrain.data.tokenization import barred_ids, load_tokenizer
from pretrain.errors import UserError
from pretrain.masking.learning.extractor import WEIGHTS, Extractor
from pretrain.masking.learning.spans import units_of

BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 15}  # of a forward pass, padding included


def annotate_learned(
    corpus: str | Path,
    model: str | Path,
    *,
    top_k: int | None = None,
    max_span: int | None = None,
    name: str = LEARNED,
    overwrite: bool = False,
) -> dict:
    """Annotate the stores of a prepared corpus with the best spans of each sample; an interrupted annotation goes on.

    Args:
        corpus: folder that ``medley prepare`` wrote.
        model: folder that ``medley learn-mask`` wrote.
        top_k: most spans of a sample; None takes what the extractor was judged by.
        max_span: most tokens of a span; None takes the extractor's.
        name: of the annotation.
        overwrite: replace the annotation, if the stores have it.

    Returns:
        The summary of :func:`pretrain.data.annotate.annotate_stores`.

    Raises:
        UserError: for whatever the user can mend, such as an extractor with another tokenizer than the corpus.
    """
    corpus, model = Path(corpus), Path(model)
    for option, value in (("--top-k", top_k), ("--max-span", max_span)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name}: must be of letters, digits, '_', '.' and '-'")
    stores = prepared_stores(corpus)
    todo = lacking(stores, name, overwrite)
    extractor, card = Extractor.load(model)
    top_k, max_span = top_k or card.top_k, max_span or card.max_span
    check_fits(extractor, model, corpus, max(store.max_length for store in stores.values()))
    made_by = {
        "annotation": LEARNED,
        "method": card.method,
        "model_sha256": hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest(),
        "top_k": top_k,
        "max_span": max_span,
    }

    def units(store: Store, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return learned_units(extractor, store, first, top_k, max_span)

    return annotate_stores(todo, name, "spans", made_by, units)


def learned_units(
    extractor: Extractor, store: Store, first: int, top_k: int, max_span: int, batch_tokens: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (units, lengths) of the samples from ``first`` on, as an ``AnnotationWriter`` takes them.

    The samples of a chunk are batched by length. Chunks are the same wherever one of them is begun with, so an
    annotation that was interrupted comes out as if it had not been.

    Args:
        batch_tokens: most tokens of a forward pass, padding included, if samples are no longer.
    """
    budget = batch_tokens or BATCH_TOKENS[extractor.device.type]
    for begin, end in chunks(store, first):
        ids = np.arange(begin, end)
        yield units_of_samples(extractor, store, ids, top_k, max_span, budget), np.array(store.lengths[ids], np.int64)


def units_of_samples(
    extractor: Extractor, store: Store, ids: np.ndarray, top_k: int, max_span: int, batch_tokens: int
) -> np.ndarray:
    """Return the units of some samples, one after another, ``[sum of lengths]`` int64."""
    lengths = np.array(store.lengths[ids], np.int64)
    starts = np.cumsum(lengths) - lengths
    units, waiting = np.full(lengths.sum(), NO_UNIT, np.int64), None
    for part in _batches(lengths, batch_tokens):
        tokens, real = extractor.pad(store.samples(ids[part]))
        spans = extractor.spans(tokens, real, top_k, max_span)
        done, waiting = waiting, (part, units_of(spans, tokens.shape[1]), spans.scores.isnan().any())
        _place(done, units, starts, lengths)  # while the device computes the next
    _place(waiting, units, starts, lengths)
    return units


def _batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield all samples in batches of like length, the longest first, so that memory is short at once or never."""
    order, at = np.argsort(-lengths, kind="stable"), 0
    while at < len(order):
        rows = max(1, budget // int(lengths[order[at]]))
        yield order[at : at + rows]
        at += rows


def _place(
    batch: tuple[np.ndarray, torch.Tensor, torch.Tensor] | None,
    units: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Write the units of a batch, ``[rows, length]``, to where its samples are in ``units [sum of lengths]``."""
    if batch is None:
        return
    samples, its_units, broken = batch
    if broken:
        raise UserError("--model: its logits are not finite; learn it again with a lower --lr")
    for sample, row in zip(samples, its_units.cpu().numpy(), strict=True):
        units[starts[sample] : starts[sample] + lengths[sample]] = row[: lengths[sample]]


def check_fits(extractor: Extractor, model: Path, corpus: Path, longest: int) -> None:
    """Raise UserError unless the extractor reads samples of up to ``longest`` tokens, and ids as the corpus means
    them."""
    _check_tokenizer(extractor, model, corpus)
    if longest > extractor.longest:
        raise UserError(
            f"--model {model}: reads {extractor.longest} tokens, but {corpus} has samples of {longest}; prepare the "
            f"corpus with 'medley prepare … --max-length {extractor.longest}', or learn from a model that reads more"
        )


def _check_tokenizer(extractor: Extractor, model: Path, corpus: Path) -> None:
    ours, theirs = extractor.tokenizer, load_tokenizer(corpus / "tokenizer")
    mine, its = ours.get_vocab(), theirs.get_vocab()
    if mine == its and barred_ids(ours) == barred_ids(theirs):
        return
    if len(mine) != len(its):
        differ = f"{len(mine):,} entries against {len(its):,}"
    else:
        names = ours.convert_ids_to_tokens(range(len(mine))), theirs.convert_ids_to_tokens(range(len(its)))
        pairs = [(index, *pair) for index, pair in enumerate(zip(*names, strict=True)) if pair[0] != pair[1]]
        differ = "id {} is {!r} against {!r}".format(*pairs[0]) if pairs else "other special tokens"
    raise UserError(
        f"--model {model}: its tokenizer is not that of {corpus} ({differ}); prepare the corpus with it: "
        f"medley prepare … --tokenizer {model} --out {corpus} --overwrite"
    )


def annotate_with(args: argparse.Namespace) -> dict:
    """Run ``medley annotate CORPUS learned``; return the summary."""
    if args.model is None:
        raise UserError("--model: name the extractor; make one with 'medley learn-mask supervised'")
    keys = {"top_k": args.top_k, "max_span": args.max_span, "name": args.called or LEARNED}
    return annotate_learned(args.corpus, args.model, **keys, overwrite=args.overwrite)
