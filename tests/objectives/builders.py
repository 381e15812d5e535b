"""Models with one objective, for any objective of the registry."""

import itertools
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pretrain.data.annotations import NO_UNIT
from pretrain.data.batch import Batch
from pretrain.model.multi_objective import MultiObjectiveModel
from pretrain.objectives.base import build_objectives, parse_objectives
from tests.builders import (
    PAIRED_VOCABULARY,
    TINY_PAIRED,
    VOCABULARY,
    lay_out,
    random_samples,
    tiny_encoder,
    word_tokenizer,
)


def model_with(
    name: str, family: str = "bert", seed: int = 1, dropout: float = 0.1, impl: str = "auto", vocabulary=None, **keys
) -> MultiObjectiveModel:
    """Return a model with one objective, configured by ``keys``, and before it those that it builds on; in evaluation
    mode (dropout is there, but off)."""
    if name in ("end_task", "task_mlm"):
        keys = {"task": str(Path(_tiny_task().name) / "tiny"), **keys}
    vocabulary = vocabulary or (PAIRED_VOCABULARY if family in TINY_PAIRED else VOCABULARY)
    others = {"rtd": {}} if name == "correction" or (name == "std" and "generator_weight" in keys) else {}
    objectives = build_objectives(parse_objectives({**others, name: keys}, "test"), vocabulary, seed, impl)
    objectives[name].prepare(word_tokenizer(), 24)
    encoder = tiny_encoder(family, dropout=dropout)
    torch.manual_seed(0)  # of the heads
    model = MultiObjectiveModel(encoder, objectives).eval()
    if name == "correction":  # its discriminator shall be of two minds
        model.heads["detection"].dense_prediction.weight.data *= 10
    return model


def write_task(folder: Path, seed: int = 0, regression: bool = False, pairs: bool = False, **sizes: int) -> Path:
    """Write a task of the words of :func:`word_tokenizer`: three classes, or numbers, told by the first word."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for split, size in {"train": 23, "dev": 7, "test": 5, **sizes}.items():
        lines = []
        for number in range(size):
            first, *others = rng.choice(VOCABULARY.ordinary_ids[1:], rng.integers(1, 19)).tolist()
            text = " ".join(f"w{word}" for word in (first, *others))
            fields = {"text_a": text, "text_b": f"w{first} w{8 + number}"} if pairs else {"text": text}
            lines.append(fields | {"label": first / 10 + 100 if regression else "abc"[first % 3]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@cache
def _tiny_task() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="tiny-task-")
    write_task(Path(folder.name) / "tiny")
    return folder


def rows_of_samples(rows: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Return rows of one to three samples; some samples are a single token."""
    rng = np.random.default_rng(seed)
    return [random_samples(rng.integers(1, 24, rng.integers(1, 4)), seed=100 * seed + row) for row in range(rows)]


def numbered(rows: list[list[np.ndarray]], numbers: list[list[int]], **keys) -> Batch:
    """Lay out rows whose samples have the given ids; visits follow from the ids."""
    ids = [number for row in numbers for number in row]
    return annotated(lay_out(rows, ids=ids, visits=[number % 3 for number in ids], **keys))


def annotated(batch: Batch, name: str = "salient") -> Batch:
    """Give a batch an annotation: three tokens of every seven of a sample are a unit."""
    units = torch.where(batch.real & (batch.position_ids % 7 // 3 == 1), batch.position_ids // 7, NO_UNIT)
    return replace(batch, units={name: units})


def ids_of(rows: list[list[np.ndarray]], first: int = 0) -> list[list[int]]:
    """Number the samples of some rows consecutively."""
    numbers, result = itertools.count(first), []
    for row in rows:
        result.append([next(numbers) for _ in row])
    return result
