"""A corpus in which only some tokens tell of the end task, and runs that learn a masking policy on it.

Every sample has a class. A third of its tokens are signal words, which belong to its class; the others are noise words
drawn at random. The end task is to tell the class.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM

from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.masking.learning.meta import main
from tests.builders import CLS, MASK, PAD, SEP, word_tokenizer
from tests.training.runs import DS

CLASSES, SIGNALS, NOISE = 3, 4, 30
FIRST = 5
"""The first word's id; the signal words come first, class by class."""
VOCABULARY_SIZE = FIRST + CLASSES * SIGNALS + NOISE


def _sample(rng: np.random.Generator) -> tuple[list[int], int]:
    kind, length = int(rng.integers(CLASSES)), int(rng.integers(9, 16))
    words = []
    for _ in range(length):
        if rng.random() < 1 / 3:
            words.append(FIRST + kind * SIGNALS + int(rng.integers(SIGNALS)))
        else:
            words.append(FIRST + CLASSES * SIGNALS + int(rng.integers(NOISE)))
    return words, kind


def write_signal_corpus(folder: Path, samples: int = 400) -> Path:
    word_tokenizer(VOCABULARY_SIZE).save_pretrained(folder / "tokenizer")
    rng, writer = np.random.default_rng(0), StoreWriter(folder / "train", VOCABULARY_SIZE)
    for _ in range(samples):
        words, _ = _sample(rng)
        writer.append(np.array([CLS, *words, SEP]), np.array([len(words) + 2]))
    writer.close()
    return folder


def write_signal_task(folder: Path, shuffled: bool = False, train: int = 300) -> Path:
    """Write the end task; ``shuffled`` gives every sample the class of another: the control."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for split, size in {"train": train, "dev": 20, "test": 20}.items():
        samples = [_sample(rng) for _ in range(size)]
        kinds = np.array([kind for _, kind in samples])
        if shuffled:
            kinds = kinds[rng.permutation(size)]
        rows = [
            {"text": " ".join(f"w{word}" for word in words), "label": "abc"[kind]}
            for (words, _), kind in zip(samples, kinds, strict=True)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(corpus: Path, task: Path, run: Path, **changes) -> dict:
    """Return a recipe for a model of a few thousand parameters; ``changes`` are dotted keys with ``__`` for dots."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    document = {
        "run": str(run),
        "seed": 3,
        "data": {"store": str(corpus), "row_length": 64},
        "model": {"family": "bert", "size": None, "dropout": 0.0, "overrides": sizes},
        "objectives": {
            "mlm": {"masking": {"rate": 0.2}},
            "end_task": {"task": str(task), "samples_per_row": 4, "dropout": 0.0, "pooling": "mean"},
        },
        "training": {"steps": 6, "batch_rows": 8, "micro_batch_rows": 4, "optimizer": {"learning_rate": 0.003}},
        "policy": {
            "model": {"family": "bert", "size": None, "overrides": {**sizes, "num_hidden_layers": 1}},
            "learning_rate": 0.003,
        },
        "checkpoint": {"interval_steps": 3},
        "log": {"interval_steps": 50},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return document


def learn(document: dict, *arguments: str, ds: str = "zero2.json") -> tuple[int, str, str]:
    """Call the command in this process, as one rank; return exit code, standard output and standard error."""
    path = Path(document["run"]).with_suffix(f".rank{os.environ.get('RANK', 0)}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.enable_grad():
        code = main(["--ds_config", str(DS / ds), "--config", str(path), "--timeout", "60", *arguments])
    return code, out.getvalue(), err.getvalue()


def pretrain(corpus: Path, folder: Path, steps: int = 200, **sizes: int) -> Path:
    """Write a model that random masks have taught for a while, by a plain loop: the beginning of a meta run."""
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY_SIZE, max_position_embeddings=32, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_hidden_layers=1, num_attention_heads=2, **sizes,
        )
    )  # fmt: skip
    optimizer, store = torch.optim.AdamW(model.parameters(), 3e-3), Store(corpus / "train")
    samples = [torch.from_numpy(store[index].astype(np.int64)) for index in range(len(store))]
    tokens = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=PAD)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (64,))]
        hidden = (torch.rand(batch.shape) < 0.2) & (batch >= FIRST)
        inputs = torch.where(hidden, MASK, batch)
        loss = model(inputs, attention_mask=(batch != PAD).long(), labels=torch.where(hidden, batch, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
