"""Reading documents: any source becomes a stream of pieces of text, with what is skipped counted and told."""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data.sources import DATASET, Source, opened
from pretrain.data.splitting import PIECE_CHARACTERS, cut_text
from pretrain.errors import UserError, unknown

DOCUMENTS = ("blank_line", "line", "file")  # what a document is in a .txt file
EXAMPLES = 3  # of each kind of skipped thing are told and kept
FIRST_RECORDS = 100  # without the field, before any with it: the field's name is wrong
HOPELESS = 100  # bad documents, at ten times the rate allowed: no need to read on

BAD = ("invalid UTF-8", "broken JSON", "no such field", "field is not text")
EMPTY = "empty document"

# One part of a document: its line or row, its content, and whether it begins a document. A bad one is told by kind.
Fragment = tuple[int, bytes | str | Exception, bool]
Piece = tuple[str, bool]  # text without white space around it, and whether it begins a document


class BadDocument(Exception):
    """A document that cannot be read; the message is one of ``BAD``."""


class Tally:
    """Counts documents and what is skipped; stops the run when too much of it is bad.

    Args:
        max_bad: the largest fraction of documents that may be bad; empty ones are not bad.
        field: the name of the text's field, for the error when no record has it.
        say: called with one line for each of the first few skipped things of a kind.
    """

    def __init__(self, max_bad: float, field: str, say: Callable[[str], None]):
        self.max_bad, self.field, self.say = max_bad, field, say
        self.documents = 0
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.fields: set[str] = set()  # seen in records that lack the field

    @property
    def bad(self) -> int:
        """Number of bad documents so far."""
        return sum(self.skipped[kind] for kind in BAD)

    def skip(self, kind: str, name: str, number: int) -> None:
        """Count a document skipped at line or row ``number`` of ``name``; raise UserError when it is hopeless."""
        self.skipped[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{name}:{number}")
            self.say(f"skipped {examples[-1]}: {kind}")
        if self.documents == 0 and self.skipped["no such field"] >= FIRST_RECORDS:
            self._raise_if_no_field()
        if self.bad > HOPELESS and self.bad > 10 * self.max_bad * (self.documents + self.bad):
            raise UserError(self._too_many())

    def check(self) -> None:
        """Raise UserError at the end of the input if nothing was read or too much of it was bad."""
        if self.documents == 0:
            self._raise_if_no_field()
        if self.bad > self.max_bad * (self.documents + self.bad):
            raise UserError(self._too_many())
        if self.documents == 0:
            counts = ", ".join(f"{count:,} × {kind}" for kind, count in self.skipped.items())
            raise UserError(f"the input holds no document{f' ({counts})' if counts else ''}")

    def _raise_if_no_field(self) -> None:
        if self.skipped["no such field"]:
            raise unknown("field", self.field, self.fields, where=self.examples["no such field"][0])

    def _too_many(self) -> str:
        first = "; ".join(f"{places[0]}: {kind}" for kind, places in self.examples.items() if kind in BAD)
        return (
            f"{self.bad:,} of {self.documents + self.bad:,} documents are bad, more than --max-bad {self.max_bad:g} "
            f"allows: {first}"
        )


class Reader:
    """Reads sources one after another in bounded memory.

    Args:
        field: the JSON key or column that holds the text.
        documents: what a document is in a ``.txt`` file: ``blank_line`` (text between blank lines), ``line``, ``file``.
        dataset_config, dataset_split: of Hugging Face datasets.
    """

    def __init__(
        self, sources: list[Source], field: str, documents: str, dataset_config: str | None, dataset_split: str
    ):
        self.sources, self.field, self.documents = sources, field, documents
        self.dataset_config, self.dataset_split = dataset_config, dataset_split
        self._finished, self._raw = 0, None

    @property
    def total_bytes(self) -> int | None:
        """Size of all sources on disk, None if one of them has no known size."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(sizes)

    @property
    def position(self) -> int:
        """Bytes on disk read so far."""
        return self._finished + (self._raw.tell() if self._raw else 0)

    def pieces(self, tally: Tally) -> Iterator[Piece]:
        """Yield the pieces of all documents of all sources, in order; what is skipped goes to ``tally``."""
        for source in self.sources:
            yield from self.pieces_of(source, tally)

    def pieces_of(self, source: Source, tally: Tally) -> Iterator[Piece]:
        """Yield the pieces of one source's documents, each of at most ``PIECE_CHARACTERS``."""
        if source.format == DATASET:
            rows = _dataset_rows(source.name, self.field, self.dataset_config, self.dataset_split, tally)
            yield from _assembled(source.name, rows, tally)
            return
        with opened(source) as (content, raw):
            self._raw = raw
            try:
                if source.format == ".txt":
                    fragments = _text_fragments(content, self.documents)
                elif source.format == ".jsonl":
                    fragments = _json_lines(content, self.field, tally)
                else:
                    fragments = _parquet_rows(content, source.name, self.field)
                yield from _assembled(source.name, fragments, tally)
            finally:
                self._raw = None
                self._finished += source.size

    def sample(self, characters: int, tally: Tally) -> Iterator[Piece]:
        """Yield about ``characters`` of text in pieces: of each source the beginning, in proportion to its size."""
        total = sum(source.size or 0 for source in self.sources)
        for source in self.sources:
            share = 1 / len(self.sources) if self.total_bytes is None else source.size / max(total, 1)
            left = share * characters
            for text, first in self.pieces_of(source, tally):
                yield text, first
                left -= len(text)
                if left <= 0:
                    break


def _assembled(name: str, fragments: Iterable[Fragment], tally: Tally) -> Iterator[Piece]:
    """Join fragments to documents and yield these in pieces; a bad fragment ends its document."""
    held: list[str] = []
    size = pieces = 0
    start: int | None = None  # line or row of the current document; None before the first and in a bad one

    def piece() -> Iterator[Piece]:
        nonlocal size, pieces
        if text := "".join(held).strip():
            tally.documents += pieces == 0
            pieces += 1
            yield text, pieces == 1
        held.clear()
        size = 0

    for number, content, begins in fragments:
        if begins:
            if start is not None:
                yield from piece()
                if pieces == 0:
                    tally.skip(EMPTY, name, start)
            start, pieces = number, 0
        elif start is None:
            continue
        try:
            text = _text(content)
        except BadDocument as error:
            held.clear()
            size, start = 0, None
            tally.skip(str(error), name, number)
            continue
        for part in cut_text(text):
            if held and size + len(part) > PIECE_CHARACTERS:
                yield from piece()
            held.append(part)
            size += len(part)
    if start is not None:
        yield from piece()
        if pieces == 0:
            tally.skip(EMPTY, name, start)


def _text(content: bytes | str | Exception) -> str:
    if isinstance(content, bytes):
        try:
            return content.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise BadDocument("invalid UTF-8") from None
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
            raise BadDocument("invalid UTF-8") from None
        return content
    raise content


def _text_fragments(content: BinaryIO, documents: str) -> Iterator[Fragment]:
    """Yield the lines of a text file, long ones in parts; ``documents`` says where a document begins."""
    begins, previous = True, 0
    if documents == "file":
        yield 1, b"", True  # so that an empty file is an empty document
        begins = False
    for number, line in _bounded_lines(content):
        if documents != "file" and number != previous and line.isspace():
            begins, previous = True, number
            continue
        yield number, line, begins or (documents == "line" and number != previous)
        begins, previous = False, number


def _bounded_lines(content: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line); a line longer than a piece comes in parts that end after a space or a character."""
    number, held = 1, b""
    while part := content.readline(PIECE_CHARACTERS):
        line, held = held + part, b""
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(part) == PIECE_CHARACTERS and not line.endswith(b"\n"):
            cut = line.rfind(b" ") + 1 or _character_border(line)
            line, held = line[:cut], line[cut:]
        yield number, line
        number += line.endswith(b"\n")
    if held:
        yield number, held


def _character_border(line: bytes) -> int:
    """Return the end of ``line``, before its last character's first byte if that is of several."""
    for back in range(1, 5):
        if line[-back] >= 0xC0:
            return len(line) - back
        if line[-back] < 0x80:
            break
    return len(line)


def _json_lines(content: BinaryIO, field: str, tally: Tally) -> Iterator[Fragment]:
    for number, line in enumerate(content, 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            yield number, BadDocument("invalid UTF-8"), True
        except (ValueError, RecursionError):
            yield number, BadDocument("broken JSON"), True
        else:
            yield number, _field(record, field, tally), True


def _field(record: object, field: str, tally: Tally) -> str | BadDocument:
    if not isinstance(record, dict):
        return BadDocument("broken JSON")
    if field not in record:
        tally.fields.update(list(record)[:20] if len(tally.fields) < 100 else ())
        return BadDocument("no such field")
    text = record[field]
    return text if isinstance(text, str) else BadDocument("field is not text")


def _parquet_rows(content: BinaryIO, name: str, field: str) -> Iterator[Fragment]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(content)
        schema = file.schema_arrow
        if field not in schema.names:
            raise unknown("field", field, schema.names, where=name)
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{name}: column '{field}' holds {kind}, not text; name another with --field")
        row = 0
        for batch in file.iter_batches(256, columns=[field]):
            for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                row += 1
                yield row, BadDocument("field is not text") if value is None else value, True
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be read as Parquet ({reason})") from None


def _dataset_rows(name: str, field: str, config: str | None, split: str, tally: Tally) -> Iterator[Fragment]:
    import datasets

    path = name.removeprefix(DATASET)
    try:
        if Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file():  # by save_to_disk
            dataset = datasets.load_from_disk(path)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
        else:
            dataset = datasets.load_dataset(path, config, split=split, streaming=True)
        if dataset.column_names is not None:
            if field not in dataset.column_names:
                raise unknown("field", field, dataset.column_names, where=name)
            dataset = dataset.select_columns([field])
        for number, record in enumerate(dataset, 1):
            yield number, _field(record, field, tally), True
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # the library, its scripts and the network raise whatever they meet
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be read by datasets ({type(error).__name__}: {reason})") from None
