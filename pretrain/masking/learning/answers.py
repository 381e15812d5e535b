"""Contexts and the answers in them: what a span extractor learns from.

A file is JSON lines, ``{"context": …, "answers": [{"text": …, "start": character}, …]}``, or SQuAD's JSON (1.1 or
2.0: ``data``, ``paragraphs``, ``qas``, ``answers`` with ``answer_start``). Questions are not read, and what SQuAD 2.0
marks as impossible has no answer.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError, nearest

EXAMPLES = 3  # of bad answers are kept
_SHAPES = 'give JSON lines {"context": …, "answers": [{"text": …, "start": …}]}, or SQuAD\'s JSON'

Record = tuple[str, str, list[tuple[str, object, object]]]
"""(place, context, answers as (place, text, start))."""


@dataclass(frozen=True)
class Context:
    """A text and its answers: distinct (start, end) in characters, without white space around them."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Answers:
    """What a file holds: each context once, in the order of the file."""

    contexts: list[Context]
    bad: int
    """Answers that lie outside their context or are not what stands there, and are left out."""
    examples: list[str]
    """The first of them, in words."""
    sha256: str
    """Of the file."""


def read_answers(path: str | Path, max_bad: float) -> Answers:
    """Read a file of contexts and answers; at most a fraction ``max_bad`` of the answers may be bad.

    Raises:
        UserError: if it cannot be read, is of neither shape, has no answer, or too many bad ones. Names file and
            line, or question, and what is wrong.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start} ({error.reason}); convert the file") from None
    found: dict[str, dict[tuple[int, int], None]] = {}
    total, bad, examples = 0, 0, []
    for _, context, answers in _records(path, text):
        spans = found.setdefault(context, {})
        for place, answer, start in answers:
            total += 1
            if fault := _fault(context, answer, start):
                bad += 1
                examples += [f"{place}: {fault}"][: EXAMPLES - len(examples)]
            else:
                first = start + len(answer) - len(answer.lstrip())
                spans[first, first + len(answer.strip())] = None
    if bad > max_bad * total:
        raise UserError(f"{examples[0]} ({bad:,} of {total:,} answers are bad, --max-bad is {max_bad:g})")
    if total == bad:
        raise UserError(f"{path}: holds no answer; {_SHAPES}")
    contexts = [Context(context, tuple(spans)) for context, spans in found.items()]
    return Answers(contexts, bad, examples, hashlib.sha256(raw).hexdigest())


def _fault(context: str, answer: object, start: object) -> str | None:
    """Say in words what is wrong with an answer, if anything is."""
    if not isinstance(answer, str) or not answer.strip():
        return f"the answer's text is {_short(answer)}; it must be text that stands in the context"
    if not isinstance(start, int) or isinstance(start, bool):
        return f"answer {_short(answer)}: its start is {_short(start)}, not a number of characters"
    if start >= 0 and context[start : start + len(answer)] == answer:
        return None
    elsewhere = context.find(answer)
    hint = f"; it stands at {elsewhere}" if elsewhere >= 0 else ""
    if start < 0 or start + len(answer) > len(context):
        return f"answer {_short(answer)} at {start} lies outside its context of {len(context)} characters{hint}"
    there = _short(context[start : start + len(answer)])
    return f"answer {_short(answer)} at {start}: the context has {there} there{hint}"


def _short(value: object) -> str:
    told = " ".join(repr(value).split())
    return told if len(told) <= 40 else f"{told[:38]}…{told[0]}"


def _records(path: Path, text: str) -> Iterator[Record]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None  # several lines
    if isinstance(document, dict) and "data" in document:
        yield from _squad(path, document)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}); {_SHAPES}") from None
        answers = _field(place, row, "answers", list)
        marked = [(place, _field(place, a, "text", object), _field(place, a, "start", object)) for a in answers]
        yield place, _field(place, row, "context", str), marked


def _squad(path: Path, document: dict) -> Iterator[Record]:
    for a, article in enumerate(_field(str(path), document, "data", list)):
        for p, paragraph in enumerate(_field(f"{path}: data[{a}]", article, "paragraphs", list)):
            place, marked = f"{path}: data[{a}].paragraphs[{p}]", []
            for q, question in enumerate(_field(place, paragraph, "qas", list)):
                its = f"{place}.qas[{q}]"
                if isinstance(question, dict) and "id" in question:
                    its = f"{path}: question {question['id']}"
                answers = _field(its, question, "answers", list)
                if not question.get("is_impossible", False):
                    marked += [
                        (its, _field(its, answer, "text", object), _field(its, answer, "answer_start", object))
                        for answer in answers
                    ]
            yield place, _field(place, paragraph, "context", str), marked


def _field(place: str, row: object, name: str, kind: type):
    if not isinstance(row, dict):
        raise UserError(f"{place}: a {type(row).__name__} where an object with '{name}' is needed; {_SHAPES}")
    if name not in row:
        match = nearest(name, row)
        hint = f"did you mean '{match}'?" if match else _SHAPES
        raise UserError(f"{place}: no '{name}' (there is {', '.join(row) or 'nothing'}); {hint}")
    if not isinstance(row[name], kind):
        raise UserError(f"{place}: '{name}' is {_short(row[name])}, not a {kind.__name__}; {_SHAPES}")
    return row[name]
