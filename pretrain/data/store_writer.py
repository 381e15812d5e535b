"""Writing a token store: sample by sample, in constant memory, in shards."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pretrain.data.store import FORMAT_VERSION, ROW

SHARD_MEGABYTES = 1024.0


class StoreWriter:
    """Writes one store. The folder is a store only after :meth:`close`.

    Args:
        folder: to make.
        vocabulary_size: ids are below; it decides how many bytes a token takes.
        shard_megabytes: most of a shard, in 10⁶ bytes; only a sample that is longer has one of its size.
    """

    def __init__(self, folder: str | Path, vocabulary_size: int, shard_megabytes: float = SHARD_MEGABYTES):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.vocabulary_size = vocabulary_size
        self.dtype = np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")
        self.samples = self.token_count = self.max_length = 0
        self._shard_tokens = int(shard_megabytes * 1e6) // self.dtype.itemsize
        self._shards: list[_HashedFile] = []
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
        ends = np.cumsum(lengths)
        index = np.stack([self.token_count + ends - lengths, lengths], axis=1).astype(ROW.base).tobytes()
        self._index.write(index)
        self._index_hash.update(index)
        self._write_tokens(tokens.astype(self.dtype), ends)
        self.samples += len(lengths)
        self.token_count += len(tokens)
        self.max_length = max(self.max_length, int(lengths.max()))

    def _write_tokens(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Spread samples over shards; ``ends [samples]`` is where each of them ends in ``tokens``."""
        self._tokens_hash.update(tokens.tobytes())
        written = 0
        while written < len(tokens):
            begun = self._shards[-1].bytes // self.dtype.itemsize if self._shards else self._shard_tokens
            fitting = np.searchsorted(ends, written + self._shard_tokens - begun, side="right")
            end = int(ends[fitting - 1]) if fitting else 0
            if end <= written:
                if begun or not self._shards:
                    self._new_shard()
                    continue
                end = int(ends[fitting])  # of a sample longer than a shard
            self._shards[-1].write(tokens[written:end].tobytes())
            written = end

    def _new_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(_HashedFile(self.folder / f"tokens-{len(self._shards):05d}.bin"))

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokens and index so far."""
        return hashlib.sha256(self._tokens_hash.digest() + self._index_hash.digest()).hexdigest()

    def close(self, **meta) -> None:
        """Turn the folder into a store; ``meta`` (tokenizer, source, …) is added to ``meta.json``."""
        if self._shards:
            self._shards[-1].close()
        self._index.close()
        raw = self.folder / "index.raw"
        with open(raw, "rb") as rows:
            index = write_index(self.folder, self.samples, rows)
        raw.unlink()
        document = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.str,
            "samples": self.samples,
            "tokens": self.token_count,
            "max_length": self.max_length,
            "fingerprint": self.fingerprint,
            "shards": [shard.entry for shard in self._shards],
            "index": index,
            **meta,
        }
        (self.folder / "meta.json").write_text(json.dumps(document, indent=2) + "\n")


class _HashedFile:
    """A file that is written once, from its start to its end, and hashed on the way."""

    def __init__(self, path: Path):
        self.path, self.bytes = path, 0
        self._file, self._hash = open(path, "wb"), hashlib.sha256()

    def write(self, content: bytes) -> int:
        self._file.write(content)
        self._hash.update(content)
        self.bytes += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()

    @property
    def entry(self) -> dict:
        """What ``meta.json`` says of the file."""
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self._hash.hexdigest()}


def write_index(folder: Path, samples: int, rows: BinaryIO) -> dict:
    """Write ``index.npy`` of a store from its rows, offset and length as little-endian int64; return its entry in
    ``meta.json``."""
    file = _HashedFile(folder / "index.npy")
    np.lib.format.write_array_header_1_0(file, {"descr": ROW.base.str, "fortran_order": False, "shape": (samples, 2)})
    shutil.copyfileobj(rows, file, 1 << 20)
    file.close()
    return file.entry
