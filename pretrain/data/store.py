"""The token store: samples of token ids in files that are read and never mapped.

A prepared corpus is a folder::

    tokenizer/            a Hugging Face tokenizer, as ``save_pretrained`` writes it
    train/                a store
    heldout/              a store of the documents held out

and each store is a folder of files::

    tokens-00000.bin …    shards: all samples one after another, little-endian uint16 or uint32; none in two shards
    index.npy             [samples, 2] int64: offset and length in tokens; offsets count through all shards
    meta.json             format version, dtype, counts, the files' sizes and hashes, tokenizer, source, fingerprint

A sample holds its special tokens ([CLS] … [SEP] or the like) as it will be fed to the model. Its global id is its
index in the store and never changes. How many shards there are changes nothing else: neither ids nor offsets nor the
fingerprint.

A *view* is a store of some samples of another: it has no tokens, its offsets are those in the other's, which
``view_of`` in ``meta.json`` names. See ``view.py``.
"""

import json
from pathlib import Path

import numpy as np

from pretrain.data.disk_array import DiskArray, Part
from pretrain.errors import UserError

FORMAT_VERSION = 2
WHOLE_VERSION = 1  # its stores have all tokens in ``tokens.bin``, and no hashes of files
AGAIN = "the store is damaged: prepare the corpus again"
ROW = np.dtype(("<i8", (2,)))  # of the index


class Store:
    """Read access to one store: opens in constant time, holds what was asked for, and maps nothing.

    Attributes:
        index: ``index[samples]`` reads offsets and lengths in tokens, ``[…, 2]`` int64; ``offsets`` and ``lengths`` are
            its columns.
        tokens: the tokens by their offsets. ``tokens.runs(offsets, lengths)`` reads samples one after another.

    Raises:
        UserError: if the folder is not a store, is of another format version, or a file's size contradicts
            ``meta.json`` (a truncated copy, say).
        RunError: on reading, if a file has vanished or was cut short since.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.meta = _read_meta(self.folder)
        self.dtype = np.dtype(self.meta["dtype"])
        self._source = self._open_source() if "view_of" in self.meta else None
        self.tokens = self._open_tokens() if self._source is None else self._source.tokens
        self.index = self._open_index()
        self.offsets, self.lengths = Column(self.index, 0), Column(self.index, 1)

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

    def _open_tokens(self) -> DiskArray:
        size, tokens = self.dtype.itemsize, int(self.meta["tokens"])
        whole = [{"file": "tokens.bin", "bytes": tokens * size, "sha256": None}]
        shards = whole if self.meta["format_version"] == WHOLE_VERSION else self.meta["shards"]
        parts = [
            Part(self.folder / shard["file"], int(shard["bytes"]) // size, sha256=shard["sha256"]) for shard in shards
        ]
        if sum(part.items for part in parts) != tokens:
            raise UserError(f"{self.folder / 'meta.json'}: its shards do not add up to {tokens:,} tokens; {AGAIN}")
        return DiskArray(parts, self.dtype, AGAIN)

    def _open_index(self) -> DiskArray:
        file, samples = self.folder / "index.npy", len(self)
        try:
            with open(file, "rb") as opened:
                if np.lib.format.read_magic(opened) != (1, 0):
                    raise ValueError("not of version 1.0 of its format")
                shape, transposed, dtype = np.lib.format.read_array_header_1_0(opened)
                skipped = opened.tell()
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); {AGAIN}") from None
        if (shape, transposed, dtype) != ((samples, 2), False, ROW.base):
            raise UserError(f"{file}: {dtype} of shape {shape}, but meta.json says {ROW.base} of ({samples}, 2)")
        return DiskArray([Part(file, samples, skipped, self.meta.get("index", {}).get("sha256"))], ROW, AGAIN)

    @property
    def source(self) -> "Store":
        """The store that holds the tokens, and what is kept beside them: of a view another one, else this."""
        return self if self._source is None else self._source

    def __len__(self) -> int:
        return int(self.meta["samples"])

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)  # another process opens it for itself

    def __getitem__(self, sample_id: int) -> np.ndarray:
        """Return the token ids of one sample, ``[length]`` in the store's dtype."""
        return self.tokens.runs(*self.index[[sample_id]].T)

    def samples(self, ids: np.ndarray | slice) -> list[np.ndarray]:
        """Return the token ids of several samples, read together, each as ``store[id]`` has them."""
        offsets, lengths = self.index[ids].T
        return np.split(self.tokens.runs(offsets, lengths), np.cumsum(lengths)[:-1]) if len(lengths) else []

    def token_counts(self, vocabulary_size: int, sampled: int = 2**22, pieces: int = 64) -> np.ndarray:
        """Count tokens in ``pieces`` evenly spaced parts of the store, ``sampled`` tokens in all or the whole of a
        smaller one; ``[vocabulary_size]`` int64."""
        if self._source is not None:  # its samples do not lie side by side
            number = min(len(self), 1 + sampled * len(self) // max(1, self.meta["tokens"]))
            chosen = np.linspace(0, len(self) - 1, number).astype(np.int64)
            return np.bincount(self.tokens.runs(*self.index[chosen].T), minlength=vocabulary_size)
        total, size = len(self.tokens), -(-sampled // pieces)
        if total <= sampled:
            return np.bincount(self.tokens[:], minlength=vocabulary_size)
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


class Column:
    """One column of a store's index, read where it is indexed: ``[…]`` int64."""

    def __init__(self, index: DiskArray, number: int):
        self.index, self.number = index, number

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key) -> np.ndarray:
        return self.index[key][..., self.number]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


def _read_meta(folder: Path) -> dict:
    """Return a store's ``meta.json``, of a version and with the keys that a reader needs."""
    file = folder / "meta.json"
    if not file.is_file():
        hint = " (it holds a 'train' store: a prepared corpus?)" if (folder / "train").is_dir() else ""
        raise UserError(f"{folder}: not a token store: no meta.json{hint}; make one with 'medley prepare'")
    try:
        meta = json.loads(file.read_text())
        version = meta["format_version"]
        needed = ["dtype", "samples", "tokens", "max_length", "fingerprint"]
        needed += ["shards"] if version == FORMAT_VERSION and "view_of" not in meta else []
        _ = [meta[key] for key in needed]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a store's meta.json ({error!r}); prepare the corpus again") from None
    if version not in (WHOLE_VERSION, FORMAT_VERSION):
        raise UserError(
            f"{file}: format version {version}, this program reads {WHOLE_VERSION} and {FORMAT_VERSION}; prepare the "
            "corpus again"
        )
    return meta
