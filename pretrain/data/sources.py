"""Finding and opening what ``medley prepare`` is given: files, folders, globs, compressed or not."""

import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from pretrain.errors import UserError

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
DATASET = "hf:"  # marks an input that the datasets library reads


@dataclass(frozen=True)
class Source:
    """One input: a file, or a Hugging Face dataset (``format`` is ``hf:``, ``size`` None).

    ``size`` is in bytes on disk; ``compression`` is the suffix, empty for none.
    """

    name: str
    format: str
    compression: str
    size: int | None


def find_sources(inputs: Iterable[str | Path]) -> tuple[list[Source], list[str]]:
    """Turn the inputs a user named into sources, in the order given, a folder's files by name; each file once.

    Returns:
        The sources, and the files in folders that were passed over for their suffix.

    Raises:
        UserError: for an input that is missing, of an unknown suffix, or a folder without anything to read.
    """
    sources: dict[str, Source] = {}
    ignored: list[str] = []
    for name in map(str, inputs):
        if name.startswith(DATASET):
            sources[name] = Source(name, DATASET, "", None)
            continue
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            known = [file for file in files if _kind(file)]
            ignored += [str(file) for file in files if not _kind(file)]
            if not known:
                raise UserError(f"{name}: no {', '.join(FORMATS)} file in this folder ({len(files)} others)")
        elif path.is_file():
            known = [path]
        else:
            matches = map(Path, glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
            known = sorted(file for file in matches if file.is_file())
            if not known:
                hint = "; a Hugging Face dataset is named hf:NAME" if not glob.has_magic(name) else ""
                raise UserError(f"{name}: no such file or folder{hint}")
        for file in known:
            kind = _kind(file)
            if not kind:
                raise UserError(
                    f"{file}: unknown suffix '{''.join(file.suffixes[-2:])}'; valid: {', '.join(FORMATS)}, "
                    f"the first two also with {', '.join(COMPRESSIONS[1:])}"
                )
            sources.setdefault(str(file.resolve()), Source(str(file), *kind, file.stat().st_size))
    return list(sources.values()), ignored


def _kind(path: Path) -> tuple[str, str] | None:
    """Return the (format, compression) a file's name tells, or None."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        for form in FORMATS:
            if name.endswith(form + compression) and not (compression and form == ".parquet"):
                return form, compression
    return None


@contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file; give its content, decompressed, and the raw file, whose ``tell()`` is the progress in bytes.

    Raises:
        UserError: here or while it is read, if it cannot be read or its compression is broken or cut short.
    """
    try:
        with open(source.name, "rb") as raw:
            yield _decompressed(raw, source.compression), raw
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{source.name}: truncated or damaged {source.compression} file ({error})") from None
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read ({error.strerror or error})") from None


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw))
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(raw), 1 << 17)
    return raw


class _ZstdFile(io.RawIOBase):
    """Reads the frames of a zstd file and, unlike the library's own reader, notices that the last one is cut short."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            compressed = self._compressed or self._raw.read(1 << 16)
            self._compressed = b""
            if not compressed:
                if self._frame:
                    raise EOFError("ends within a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(compressed)
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
