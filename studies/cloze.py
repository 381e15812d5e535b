"""Closed-book cloze questions of a prepared corpus: which name belongs where ``[MASK]`` stands?

A fact is a name in a passage (a sample of the store): capitalised words inside a sentence, which the corpus has neither
rarely nor very often and the passage only once, so that it cannot be copied from beside the question. The passages of
the facts, and so the facts, are of three parts: on ``train`` a model is fine-tuned and a masking policy learnt, by
``dev`` settings are chosen, ``test`` is scored.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fused_objectives.philox import philox, uniform
from fused_objectives.targets import IGNORED
from pretrain.data.alignment import Detokenizer, TokenText, numbered_spans
from pretrain.data.batch import Batch, collate
from pretrain.data.output import whole_folder
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.data.tokenization import barred_ids
from pretrain.errors import UserError

PARTS = {"train": 0.45, "dev": 0.05, "test": 0.5}
"""Part → fraction of the passages."""
OCCURRENCES = (5, 200)
"""Of a name in the corpus, the fewest and the most."""
LONGEST = 6
"""Tokens of an answer."""
NEIGHBOURS = 4
"""Words on either side: passages that agree in them, as copied ones do, are one question and not two."""

_PART = r"[A-Z]\w+(?:-\w+)*"
_INSIDE = r"(?:(?<=[a-z,;] )|(?<=Mr\. )|(?<=Mrs\. )|(?<=Dr\. )|(?<=Miss ))"  # not where a sentence begins
_NAME = re.compile(rf"{_INSIDE}{_PART}(?: {_PART})*(?!\w)")
_TITLES = frozenset(("Mr", "Mrs", "Dr", "St", "Miss", "Sir", "Lady", "Lord"))
_WORD = re.compile(r"\w+(?:-\w+)*")


@dataclass(frozen=True)
class Fact:
    """A name in a passage."""

    sample: int
    """The passage: a sample of the store."""
    first: int
    last: int
    """Places of the name's tokens within the sample."""
    start: int
    """The name's first character in the passage's text."""
    answer: str
    part: str
    """One of :data:`PARTS`."""


def detokenizer(tokenizer: PreTrainedTokenizerFast) -> Detokenizer:
    """Return what gives the text of a store's samples."""
    return Detokenizer(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), barred_ids(tokenizer))


def find_facts(store: Store, text_of: Detokenizer) -> list[Fact]:
    """Return the facts of a store, in its order.

    Raises:
        UserError: if a part has none, because the text is short or without names.
    """
    passages = [text_of(store[sample].astype(np.int64)) for sample in range(len(store))]
    answers = _answers([found.text for found in passages])
    parts = part_of(np.arange(len(store)))
    facts, seen = [], set()
    for sample, found in enumerate(passages):
        words = Counter(_WORD.findall(found.text))
        for name in _NAME.finditer(found.text):
            place = _place(found, *name.span())
            alone = all(words[word] == 1 for word in _WORD.findall(name[0]))
            if name[0] not in answers or not alone or place is None:
                continue
            question = _neighbourhood(found.text, *name.span())
            if question not in seen:
                seen.add(question)
                facts.append(Fact(sample, *place, name.start(), name[0], parts[sample]))
    for part in PARTS:
        if not any(fact.part == part for fact in facts):
            raise UserError(
                f"--text: no question for '{part}': names that occur {OCCURRENCES[0]} times or more are few"
            )
    return facts


def keep_passages(store: Store, facts: Sequence[Fact], folder: Path) -> list[Fact]:
    """Write the corpus ``folder`` of the passages that hold a fact, with the tokenizer beside ``store``; return the
    facts with their new numbers."""
    samples = sorted({fact.sample for fact in facts})
    number = {sample: new for new, sample in enumerate(samples)}
    with whole_folder(folder, False, ("tokenizer", "train/meta.json", "facts.json")) as partial:
        shutil.copytree(store.folder.parent / "tokenizer", partial / "tokenizer")
        writer = StoreWriter(partial / "train", store.meta["tokenizer"]["vocabulary_size"])
        writer.append(np.concatenate([store[sample] for sample in samples]), store.lengths[samples])
        writer.close(tokenizer=store.meta["tokenizer"])
        kept = [replace(fact, sample=number[fact.sample]) for fact in facts]
        (partial / "facts.json").write_text(json.dumps([asdict(fact) for fact in kept], ensure_ascii=False))
    return kept


def read_facts(corpus: Path) -> list[Fact]:
    """Read the facts of a corpus that :func:`keep_passages` wrote."""
    return [Fact(**keys) for keys in json.loads((corpus / "facts.json").read_text())]


def part_of(samples: np.ndarray) -> list[str]:
    """Return the part that each sample belongs to: always the same, whatever the seed of a run."""
    borders = np.cumsum(list(PARTS.values()))[:-1]
    drawn = np.searchsorted(borders, uniform(philox(0, "parts of the questions", samples)[0]), side="right")
    return [list(PARTS)[number] for number in drawn]


def questions(
    store: Store, facts: Sequence[Fact], pad_id: int, mask_id: int, row_length: int
) -> tuple[Batch, torch.Tensor]:
    """Return one question a row: the passages with the answers' tokens masked, and the answers as labels."""
    rows = [np.array([fact.sample]) for fact in facts]
    batch = collate(store, rows, [np.zeros(1, np.int64)] * len(rows), 0, row_length, pad_id)
    labels = torch.full_like(batch.tokens, IGNORED)
    for row, fact in enumerate(facts):
        places = slice(fact.first, fact.last + 1)
        labels[row, places] = batch.tokens[row, places]
        batch.tokens[row, places] = mask_id
    return batch, labels


def write_answers(path: Path, store: Store, text_of: Detokenizer, facts: Iterable[Fact]) -> None:
    """Write what ``medley learn-mask supervised`` reads: one line a passage, with all its answers."""
    by_sample: dict[int, list[Fact]] = {}
    for fact in facts:
        by_sample.setdefault(fact.sample, []).append(fact)
    with open(path, "w", encoding="utf-8") as file:
        for sample, its in by_sample.items():
            answers = [{"text": fact.answer, "start": fact.start} for fact in its]
            context = text_of(store[sample].astype(np.int64)).text
            file.write(json.dumps({"context": context, "answers": answers}, ensure_ascii=False) + "\n")


def _answers(texts: list[str]) -> set[str]:
    """Return the names that can be asked for."""
    names: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in texts:
        names.update(_NAME.findall(text))
        words.update(_WORD.findall(text))
    fewest, most = OCCURRENCES
    return {
        name
        for name, count in names.items()
        if fewest <= count <= most and name not in _TITLES and words[name.lower()] < max(words[name], 1)
    }


def _place(found: TokenText, start: int, end: int) -> tuple[int, int] | None:
    """Return the first and last token of a name; None if they are too many or reach beyond it."""
    inside = np.flatnonzero(numbered_spans(found, [(start, end, 0)]) == 0)
    if not 1 <= len(inside) <= LONGEST:
        return None
    first, last = int(inside[0]), int(inside[-1])
    exact = found.text[found.starts[first] : found.ends[last]].strip() == found.text[start:end]
    return (first, last) if exact else None


def _neighbourhood(text: str, start: int, end: int) -> tuple[str, ...]:
    before, after = _WORD.findall(text[:start])[-NEIGHBOURS:], _WORD.findall(text[end:])[:NEIGHBOURS]
    return (*before, text[start:end], *after)
