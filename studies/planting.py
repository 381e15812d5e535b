"""A corpus with planted trouble: a part of its training samples is spoilt, and it is known which and how.

Spoilt samples are as long as before, but for the copies, so that length tells nothing. The held-out text stays clean.
"""

import ast
import hashlib
import json
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fused_objectives.philox import philox
from pretrain.data.documents import Reader, Tally
from pretrain.data.output import whole_folder
from pretrain.data.sources import find_sources
from pretrain.data.splitting import cut_text
from pretrain.data.store import Store
from pretrain.data.store_writer import StoreWriter
from pretrain.data.tokenization import barred_ids, continues_word, load_tokenizer
from pretrain.errors import UserError

TROUBLES = {
    "scrambled": "its words in random order",
    "foreign": "text of another domain",
    "duplicated": "one of many copies",
}
"""Trouble → what a spoilt sample is."""
SHARE = 1 / 3
"""Of the training samples that are spoilt."""
COPIES = 32
"""Of each duplicated sample."""
EXCERPT_CHARACTERS = 4096
_KINDS = "kinds.npy"


def excerpts(path: Path, megabytes: float) -> Iterator[str]:
    """Yield parts of a text file, evenly spaced, that add up to about so many megabytes."""
    sources, _ = find_sources([path])
    reader = Reader(sources, "text", "blank_line", None, "train")
    tally = Tally(0.001, "text", lambda line: None)
    parts = [part for text, _ in reader.pieces(tally) for part in cut_text(text, EXCERPT_CHARACTERS)]
    tally.check()
    every = max(1, round(sum(len(part.encode()) for part in parts) / (megabytes * 1e6)))
    yield from parts[::every]


def source_code(megabytes: float) -> Iterator[str]:
    """Yield the code of Python's standard library, without documentation strings and comments, up to a size: another
    domain than the embedded corpus, and at hand like it."""
    library, left = Path(sysconfig.get_paths()["stdlib"]), megabytes * 1e6
    files = [path for path in library.rglob("*.py") if not {"test", "site-packages"} & set(path.parts)]
    for path in sorted(files, key=lambda file: hashlib.blake2b(str(file.relative_to(library)).encode()).digest()):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        text = ast.unparse(tree)
        left -= len(text)
        yield from cut_text(text, EXCERPT_CHARACTERS)
        if left <= 0:
            return


def write_texts(texts: Iterable[str], file: Path) -> None:
    """Write texts as ``medley prepare`` reads them, a JSON line each."""
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def plant(clean: Path, foreign: Store | None, out: Path, troubles: Sequence[str]) -> None:
    """Write the corpus ``out``: that of ``clean`` with trouble of some kinds, an equal part each.

    Args:
        foreign: text of another domain, in tokens of the same tokenizer; needed for "foreign".

    Raises:
        UserError: if there is too little of it.
    """
    store, tokenizer = Store(clean / "train"), load_tokenizer(clean / "tokenizer")
    special, continuing = sorted(barred_ids(tokenizer)), continues_word(tokenizer)
    kinds = np.zeros(len(store), np.int8)
    order = np.argsort(philox(0, "planted", np.arange(len(store)))[0], kind="stable")
    parts = np.array_split(order[: round(SHARE * len(store))], len(troubles))
    samples = [store[number].astype(np.int64) for number in range(len(store))]
    for trouble, chosen in zip(troubles, parts, strict=True):
        kinds[chosen] = 1 + list(TROUBLES).index(trouble)
        if trouble == "scrambled":
            for number in chosen:
                samples[number] = _scrambled(samples[number], special, continuing, int(number))
        elif trouble == "duplicated":
            for first in range(0, len(chosen), COPIES):
                for number in chosen[first : first + COPIES]:
                    samples[number] = samples[chosen[first]]
        else:
            stream = np.asarray(foreign.tokens, np.int64)
            _replace(samples, chosen, stream[~np.isin(stream, special)], special)
    with whole_folder(out, False, ("tokenizer", "train/meta.json", _KINDS)) as partial:
        for part in ("tokenizer", "heldout"):
            shutil.copytree(clean / part, partial / part)
        writer = StoreWriter(partial / "train", store.meta["tokenizer"]["vocabulary_size"])
        writer.append(np.concatenate(samples), np.array([len(sample) for sample in samples]))
        writer.close(tokenizer=store.meta["tokenizer"])
        np.save(partial / _KINDS, kinds)


def kinds_of(corpus: Path) -> np.ndarray:
    """Return what each training sample of a planted corpus is, ``[samples]`` int8: 0 clean, n the n-th of
    :data:`TROUBLES`."""
    return np.load(corpus / _KINDS)


def _scrambled(tokens: np.ndarray, special: Sequence[int], continuing: np.ndarray, number: int) -> np.ndarray:
    """Return a sample with its words in another order; special tokens stay where they are."""
    inside = np.flatnonzero(~np.isin(tokens, special))
    begins = np.flatnonzero(~np.isin(tokens[inside], continuing))
    words = np.split(tokens[inside], begins[begins > 0])
    order = np.argsort(philox(0, "scrambled", np.arange(len(words)), number)[0], kind="stable")
    scrambled = tokens.copy()
    scrambled[inside] = np.concatenate([words[word] for word in order])
    return scrambled


def _replace(samples: list[np.ndarray], chosen: np.ndarray, stream: np.ndarray, special: Sequence[int]) -> None:
    """Put consecutive tokens of ``stream`` in the place of the chosen samples' text."""
    taken = 0
    for number in chosen:
        inside = ~np.isin(samples[number], special)
        count = int(inside.sum())
        if taken + count > len(stream):
            raise UserError(f"--other: {len(stream):,} tokens are too few; give more text, or fewer --megabytes")
        samples[number] = samples[number].copy()
        samples[number][inside] = stream[taken : taken + count]
        taken += count
