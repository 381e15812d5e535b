"""Small runs for tests: a corpus with something to learn, and the training command called in-process."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pretrain.data.store_writer import StoreWriter
from pretrain.data.tokenization import sentinel
from pretrain.training.run import main

DS = Path(__file__).parents[2] / "configs" / "ds"
WORDS = 91


def write_corpus(
    folder: Path,
    samples: int = 157,
    heldout: int = 23,
    seed: int = 0,
    sentinels: int = 0,
    shard_megabytes: float = 1.0,
    lengths: tuple[int, int] = (6, 33),
) -> Path:
    """Write a prepared corpus whose every token is decided by the one before it, up to a coin's throw.

    Samples have ``lengths[0]`` to ``lengths[1]`` − 1 tokens.
    """
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = specials + [f"w{i}" for i in range(WORDS)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials, strict=True))
    backend.add_special_tokens([sentinel(number) for number in range(sentinels)])
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(seed)
    for split, count in (("train", samples), ("heldout", heldout)):
        writer = StoreWriter(folder / split, len(words) + sentinels, shard_megabytes)
        for _ in range(count):
            text = [int(rng.integers(WORDS))]
            for _ in range(int(rng.integers(*lengths)) - 3):
                text.append((text[-1] * 7 + int(rng.integers(2))) % WORDS)
            writer.append(np.array([2, *(5 + word for word in text), 3]), np.array([len(text) + 2]))
        writer.close()
    return folder


def recipe(store: Path, run: Path, **changes) -> dict:
    """Return a recipe for a model of a few thousand parameters; ``changes`` are dotted keys with ``__`` for dots."""
    document = {
        "run": str(run),
        "seed": 3,
        "data": {"store": str(store), "row_length": 64},
        "model": {
            "family": "bert",
            "size": None,
            "dropout": 0.1,
            "overrides": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
        },
        "objectives": {"mlm": {}, "rtd": {}, "cse": {"group_rows": 2}},
        "sampler": {"name": "fixed", "shares": {"mlm": 0.5, "rtd": 0.3, "cse": 0.2}},
        "training": {"steps": 6, "batch_rows": 8, "micro_batch_rows": 2, "optimizer": {"learning_rate": 0.003}},
        "heldout": {"rows": 4},
        "checkpoint": {"interval_steps": 3},
        "log": {"interval_steps": 1},
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return document


def train(document: dict, *arguments: str, ds: str | Path = "zero2.json") -> tuple[int, str, str]:
    """Call the training command in this process, as one rank; return exit code, standard output and standard error."""
    path = Path(document["run"]).with_suffix(f".rank{os.environ.get('RANK', 0)}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    if ds == "zero3.json":
        ds = _partitioning_everything(path.with_suffix(".ds.json"))
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.enable_grad():
        code = main(["--ds_config", str(DS / ds), "--config", str(path), "--timeout", "60", *arguments])
    return code, out.getvalue(), err.getvalue()


def _partitioning_everything(path: Path) -> Path:
    """Write stage 3's configuration without the threshold under which small parameters stay whole on every rank."""
    config = json.loads((DS / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(config))
    return path


def metrics(run: Path) -> list[dict]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(checkpoint: Path) -> dict[str, str]:
    """Return file → sha256 of the weights and optimizer states of a checkpoint."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith("engine/")}
