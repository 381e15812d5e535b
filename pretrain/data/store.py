"""The token store: memory-mapped samples of token ids.

A prepared corpus is a folder::

    tokenizer/            a Hugging Face tokenizer, as ``save_pretrained`` writes it
    train/                a store
    heldout/              a store of the documents held out

and each store is a folder of three files::

    tokens.bin            all samples one after another, little-endian uint16 or uint32
    index.npy             [samples, 2] int64: offset into tokens.bin and length, in tokens
    meta.json             format version, dtype, counts, tokenizer and its hash, source, fingerprint

A sample holds its special tokens ([CLS] … [SEP] or the like) as it will be fed to the model. Its global id is its
index in the store and never changes.

A *view* is a store of some samples of another: it has no ``tokens.bin``, its offsets are those in the other's, which
``view_of`` in ``meta.json`` names. See ``view.py``.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.errors import UserError

FORMAT_VERSION = 1


class Store:
    """Read access to one store; opens in constant time and maps the files instead of reading them.

    Raises:
        UserError: if the folder is not a store, is of another format version, or a file's size contradicts
            ``meta.json`` (a truncated copy, say).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        meta_file = self.folder / "meta.json"
        if not meta_file.is_file():
            hint = " (it holds a 'train' store: a prepared corpus?)" if (self.folder / "train").is_dir() else ""
            raise UserError(f"{self.folder}: not a token store: no meta.json{hint}; make one with 'medley prepare'")
        try:
            self.meta = json.loads(meta_file.read_text())
            self.dtype, samples, tokens = np.dtype(self.meta["dtype"]), self.meta["samples"], self.meta["tokens"]
            _ = self.meta["max_length"], self.meta["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta_file}: not a store's meta.json ({error!r}); prepare the corpus again") from None
        if self.meta.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{meta_file}: format version {self.meta.get('format_version')}, this program reads {FORMAT_VERSION}; "
                "prepare the corpus again"
            )
        self._source = self._open_source() if "view_of" in self.meta else None
        if self._source is None:
            self._check_size("tokens.bin", tokens * self.dtype.itemsize)
            self.tokens = np.memmap(self.folder / "tokens.bin", self.dtype, "r") if tokens else np.empty(0, self.dtype)
        else:
            self.tokens = self._source.tokens
        try:
            index = np.load(self.folder / "index.npy", mmap_mode="r" if samples else None)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'index.npy'}: cannot be read ({error}); prepare the corpus again"
            ) from None
        if index.shape != (samples, 2):
            raise UserError(f"{self.folder / 'index.npy'}: shape {index.shape}, but meta.json says ({samples}, 2)")
        self.offsets, self.lengths = index[:, 0], index[:, 1]

    def _open_source(self) -> "Store":
        """Return the store whose tokens a view shows."""
        folder = (self.folder / self.meta["view_of"]["folder"]).resolve()
        again = "make the view again with 'medley filter'"
        if not (folder / "meta.json").is_file():
            raise UserError(f"{self.folder}: is a view of {folder}, where there is no store; put it back, or {again}")
        source = Store(folder)
        if source.fingerprint != self.meta["view_of"]["fingerprint"]:
            raise UserError(f"{self.folder}: is a view of another store than there is at {folder} now; {again}")
        return source

    @property
    def source(self) -> "Store":
        """The store that holds the tokens, and what is kept beside them: of a view another one, else this."""
        return self if self._source is None else self._source

    def _check_size(self, name: str, expected: int) -> None:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != expected:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise UserError(f"{path}: {found}, but meta.json says {expected}; the store is damaged: prepare it again")

    def __len__(self) -> int:
        return int(self.meta["samples"])

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """Return the token ids of one sample, ``[length]`` in the store's dtype (a view of the map)."""
        start = self.offsets[sample_id]
        return self.tokens[start : start + self.lengths[sample_id]]

    def token_counts(self, vocabulary_size: int, sampled: int = 2**22, pieces: int = 64) -> np.ndarray:
        """Count tokens in ``pieces`` evenly spaced parts of the store, ``sampled`` tokens in all or the whole of a
        smaller one; ``[vocabulary_size]`` int64."""
        if self._source is not None:  # its samples do not lie side by side
            number = min(len(self), 1 + sampled * len(self) // max(1, self.meta["tokens"]))
            chosen = np.linspace(0, len(self) - 1, number).astype(np.int64)
            return np.bincount(np.concatenate([self[sample] for sample in chosen]), minlength=vocabulary_size)
        total, size = len(self.tokens), -(-sampled // pieces)
        if total <= sampled:
            return np.bincount(self.tokens, minlength=vocabulary_size)
        starts = np.linspace(0, total - size, pieces).astype(np.int64)
        return sum(np.bincount(self.tokens[start : start + size], minlength=vocabulary_size) for start in starts)

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens and index, computed when the store was made; two stores that differ, differ here."""
        return self.meta["fingerprint"]

    @property
    def max_length(self) -> int:
        """Length of the longest sample, in tokens."""
        return int(self.meta["max_length"])


class StoreWriter:
    """Writes one store sample by sample in constant memory. The folder is a store only after :meth:`close`."""

    def __init__(self, folder: str | Path, vocabulary_size: int):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.vocabulary_size = vocabulary_size
        self.dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
        self.samples = self.token_count = self.max_length = 0
        self._tokens = open(self.folder / "tokens.bin", "wb")
        self._index = open(self.folder / "index.raw", "wb")
        self._tokens_hash, self._index_hash = hashlib.sha256(), hashlib.sha256()

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add samples: ``tokens [sum of lengths]`` of any integer dtype, ``lengths [samples]``, none of them zero.

        Raises:
            ValueError: if the lengths do not add up to the tokens, or a token is not in the vocabulary.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        if len(tokens) != lengths.sum() or (lengths < 1).any():
            raise ValueError(f"{len(tokens)} tokens, but positive lengths that add up to {lengths.sum()}")
        if len(tokens) == 0:
            return
        if tokens.min() < 0 or tokens.max() >= self.vocabulary_size:
            raise ValueError(f"token ids {tokens.min()}…{tokens.max()}, vocabulary of {self.vocabulary_size}")
        index = np.stack([self.token_count + np.cumsum(lengths) - lengths, lengths], axis=1).astype("<i8")
        _write(self._tokens, self._tokens_hash, tokens.astype(self.dtype).tobytes())
        _write(self._index, self._index_hash, index.tobytes())
        self.samples += len(lengths)
        self.token_count += len(tokens)
        self.max_length = max(self.max_length, int(lengths.max()))

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens and index so far."""
        return hashlib.sha256(self._tokens_hash.digest() + self._index_hash.digest()).hexdigest()

    def close(self, **meta) -> None:
        """Turn the folder into a store; ``meta`` (tokenizer, source, …) is added to ``meta.json``."""
        self._tokens.close()
        self._index.close()
        raw = self.folder / "index.raw"
        with open(self.folder / "index.npy", "wb") as out, open(raw, "rb") as rows:
            header = {"descr": "<i8", "fortran_order": False, "shape": (self.samples, 2)}
            np.lib.format.write_array_header_1_0(out, header)
            shutil.copyfileobj(rows, out, 1 << 20)
        raw.unlink()
        document = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.str,
            "samples": self.samples,
            "tokens": self.token_count,
            "max_length": self.max_length,
            "fingerprint": self.fingerprint,
            **meta,
        }
        (self.folder / "meta.json").write_text(json.dumps(document, indent=2) + "\n")


def _write(file: BinaryIO, digest, content: bytes) -> None:
    file.write(content)
    digest.update(content)
