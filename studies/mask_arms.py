"""What a masking study compares: policies, and how the annotations they read are made."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain import cli
from pretrain.data.annotate import annotate
from pretrain.data.annotation_writer import AnnotationWriter
from pretrain.data.annotations import NO_UNIT, Annotation, folder_of
from pretrain.data.store import Store
from pretrain.data.tokenization import load_tokenizer
from pretrain.errors import RunError
from pretrain.masking.learning.annotate import annotate_learned
from pretrain.masking.learning.scores import random_spans
from pretrain.masking.learning.spans import borders
from pretrain.model.vocabulary import Vocabulary
from studies.cloze import Fact, detokenizer, write_answers

TOP_K = 3
"""Spans of a passage that a learnt policy marks."""
CLASSES = 20
"""Answers, the most frequent ones, that the end task of meta-learning tells apart."""


@dataclass(frozen=True)
class Arm:
    """One policy of the study."""

    title: str
    masking: dict | None
    """Keys of ``objectives.mlm.masking`` besides the rate; None: no training between pre-training and fine-tuning."""
    annotation: str | None = None
    """The annotation that it reads."""
    needs: str | None = None
    """An arm whose annotation this one's is made of."""


ARMS = {
    "none": Arm("no intermediate training", None),
    "random": Arm("random tokens", {}),
    "whole_word": Arm("whole words", {"policy": "whole_word"}),
    "salient": Arm("salient spans", {"policy": "salient"}, "salient"),
    "supervised": Arm("learnt, supervised", {"policy": "learned", "annotation": "supervised"}, "supervised"),
    "control": Arm(
        "control: its spans, elsewhere", {"policy": "learned", "annotation": "control"}, "control", "supervised"
    ),
    "meta": Arm("learnt, meta-gradient", {"policy": "learned", "annotation": "meta"}, "meta"),
    "oracle": Arm("oracle: the answers", {"policy": "salient", "annotation": "oracle"}, "oracle"),
}


@dataclass(frozen=True)
class Workplace:
    """Where a study is at work, and what it has."""

    folder: Path
    facts: Sequence[Fact]
    learn_steps: int
    """Steps of learning a policy."""
    meta_steps: int

    @property
    def corpus(self) -> Path:
        """The prepared corpus."""
        return self.folder / "corpus"

    @property
    def base(self) -> Path:
        """The pre-trained model, as a Hugging Face folder."""
        return self.folder / "base"

    @property
    def store(self) -> Store:
        """The passages."""
        return Store(self.corpus / "train")

    def of(self, *parts: str) -> list[Fact]:
        """Return the facts of some parts."""
        return [fact for fact in self.facts if fact.part in parts]


def make_annotation(name: str, at: Workplace) -> None:
    """Make the annotation that an arm reads, unless it is there; its maker sees no question of ``test``.

    Raises:
        RunError: if a command that learns a policy fails.
    """
    if (folder_of(at.store, name) / "meta.json").is_file():
        return
    needed = ARMS[name].needs
    if needed:
        make_annotation(needed, at)
    _MAKERS[name](at)


def write_spans(store: Store, name: str, spans: dict[int, list[tuple[int, int]]]) -> None:
    """Write an annotation of kind ``spans``: sample → (first, last) places, without overlap."""
    lengths = store.lengths[:]
    units = np.full(int(lengths.sum()), NO_UNIT, np.int64)
    starts = np.cumsum(lengths) - lengths
    for sample, its in spans.items():
        for number, (first, last) in enumerate(sorted(its)):
            units[starts[sample] + first : starts[sample] + last + 1] = number
    writer = AnnotationWriter(folder_of(store, name), "spans", {"study": name}, store.fingerprint)
    try:
        writer.append(units, lengths)
        writer.finish()
        writer.publish()
    finally:
        writer.close()


def read_spans(store: Store, name: str) -> dict[int, list[tuple[int, int]]]:
    """Read an annotation of kind ``spans``; samples without one are missing."""
    units, found = Annotation(store, name, "spans").units[:], {}
    for sample, (start, length) in enumerate(store.index[:].tolist()):
        its = units[start : start + length]
        inside = np.flatnonzero(its != NO_UNIT)
        if len(inside):
            borders_ = np.flatnonzero(np.diff(its[inside].astype(np.int64))) + 1
            found[sample] = [(int(part[0]), int(part[-1])) for part in np.split(inside, borders_)]
    return found


def _oracle(at: Workplace) -> None:
    spans: dict[int, list[tuple[int, int]]] = {}
    for fact in at.facts:
        spans.setdefault(fact.sample, []).append((fact.first, fact.last))
    write_spans(at.store, "oracle", spans)


def _control(at: Workplace) -> None:
    """Move the spans of the learnt policy to random places of their passages: as many, as long, in whole words."""
    store, moved = at.store, {}
    tables = Vocabulary.of(load_tokenizer(at.corpus / "tokenizer")).tables(torch.device("cpu"))
    for sample, spans in read_spans(store, "supervised").items():
        tokens = torch.from_numpy(store[sample].astype(np.int64))[None]
        found = borders(tokens, torch.ones_like(tokens, dtype=torch.bool), tables)
        moved[sample] = random_spans(spans, found, 0, 0, sample)
    write_spans(store, "control", moved)


def _supervised(at: Workplace) -> None:
    data, extractor = at.folder / "answers.jsonl", at.folder / "supervised"
    write_answers(data, at.store, detokenizer(load_tokenizer(at.corpus / "tokenizer")), at.of("train"))
    options = {"--steps": at.learn_steps, "--lr": 1e-3, "--max-length": 64, "--top-k": TOP_K, "--dev-fraction": 0.1}
    _medley("learn-mask", "supervised", "--model", at.base, "--data", data, "--out", extractor, *_flat(options))
    annotate_learned(at.corpus, extractor, top_k=TOP_K, name="supervised")


def _meta(at: Workplace) -> None:
    task, run = at.folder / "meta-task", at.folder / "meta"
    write_end_task(task, at)
    options = {"--rate": 0.15, "--steps": at.meta_steps, "--inner-lr": 1e-3, "--policy-lr": 1e-3}
    _medley(
        *("learn-mask", "meta", "--corpus", at.corpus, "--model", at.base, "--task", task, "--out", run),
        *(*_flat(options), "training.batch_rows=8", "data.row_length=128", "model.dropout=0"),
    )
    annotate_learned(at.corpus, run / "policy", top_k=TOP_K, name="meta")


def write_end_task(folder: Path, at: Workplace) -> None:
    """Write the questions of ``train`` as an end task: which of the most frequent answers stands where "who" does?

    The task's test split is never read by learning a policy; its dev and test are the questions of ``dev``.
    """
    counts: dict[str, int] = {}
    for fact in at.of("train"):
        counts[fact.answer] = counts.get(fact.answer, 0) + 1
    frequent = sorted(counts, key=lambda answer: (-counts[answer], answer))[:CLASSES]
    store, text_of = at.store, detokenizer(load_tokenizer(at.corpus / "tokenizer"))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", "train"), ("dev", "dev"), ("test", "dev")):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for fact in at.of(part):
                if fact.answer in frequent:
                    text = text_of(store[fact.sample].astype(np.int64)).text
                    asked = f"{text[: fact.start]}who{text[fact.start + len(fact.answer) :]}"
                    file.write(json.dumps({"text": asked, "label": fact.answer}, ensure_ascii=False) + "\n")


def _medley(*words: object) -> None:
    """Run a command of ours, as the shell would."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as end:  # a run that is not done, or a wrong option
        code = end.code
    if code:
        raise RunError(f"medley {words[0]} {words[1]} ended with exit code {code}")


def _flat(options: dict[str, object]) -> list[object]:
    return [word for option in options.items() for word in option]


_MAKERS: dict[str, Callable[[Workplace], object]] = {
    "salient": lambda at: annotate(at.corpus, "salient", workers=1),
    "supervised": _supervised,
    "control": _control,
    "meta": _meta,
    "oracle": _oracle,
}
