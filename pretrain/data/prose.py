"""English prose out of documentation: without its code, tables and markup, and with names masked."""

import inspect
import re
from collections.abc import Callable, Iterable

FEWEST_CHARACTERS = 80
MASK = "PACKAGE"

# An English text of any kind has these words; code, data, and other languages have not.
COMMON = re.compile(
    r"\b(?:the|of|to|and|a|an|in|is|for|that|this|it|be|as|with|by|or|are|on|if|from|not|which|when)\b", re.I
)
WORD = re.compile(r"[A-Za-z]+")
LICENCE = re.compile(
    r"permission is hereby granted|redistribution and use in source|licensed under|all rights reserved|"
    r"without warrant|copyright (?:\(c\)|©|\d)|spdx-license|apache license|general public license",
    re.I,
)
FENCED = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[^\n]*$", re.M | re.S)
# A doctest's first line to the next blank one; "::" or a directive and the indented lines that follow.
DOCTEST = re.compile(r"^[ \t]*>>> .*?(?:\n[ \t]*$|\Z)", re.M | re.S)
LITERAL = re.compile(r"^([ \t]*)(?:\.\. [\w-]+::[^\n]*|[^\n]*::)\n(?:[ \t]*\n)*(?:\1[ \t]+[^\n]*\n?|[ \t]*\n)+", re.M)
TABLE_ROW = re.compile(r"^[^\n]*(?:\|[^\n]*\||\+[-=]{2,}|[=-]{3,}\s+[=-]{3,})[^\n]*$", re.M)
UNDERLINE = re.compile(r"^[ \t]*([=\-~^*#`'\"+.:_])\1{2,}[ \t]*$\n?", re.M)
ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`")
MARKUP = re.compile(r"`+[~!]?([^`\n]+)`+_{0,2}|<!--.*?-->|</?[a-z][^>\n]{0,200}>", re.S)
BLANK_LINES = re.compile(r"\n\s*\n\s*")


def clean(text: str) -> str | None:
    """Return the prose of a documentation string or document, or None if hardly any is left."""
    text = inspect.cleandoc(text)
    for pattern in (FENCED, DOCTEST, TABLE_ROW, UNDERLINE):
        text = pattern.sub("", text)
    text = LITERAL.sub("\n", text)
    text = ROLE.sub(r"\1", text)
    text = MARKUP.sub(lambda match: match[1] or "", text)
    paragraphs = [part.rstrip() for part in BLANK_LINES.split(text) if _is_prose(part)]
    prose = "\n\n".join(paragraphs).strip()
    if len(prose) < FEWEST_CHARACTERS or LICENCE.search(prose):
        return None
    words = len(WORD.findall(prose))
    return prose if len(COMMON.findall(prose)) >= words / 8 else None


def _is_prose(paragraph: str) -> bool:
    letters = sum(map(len, WORD.findall(paragraph)))
    return letters >= 0.7 * len("".join(paragraph.split()))


def masked(names: Iterable[str]) -> Callable[[str], str]:
    """Return a function that replaces in a text ``names``, the words they are part of, and all dotted paths.

    A name of up to four letters is replaced only where it is a word.
    """
    patterns = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        spellings = "|".join(sorted({re.escape(name), re.escape(re.sub(r"[-_.]", "", name)), _spaced(name)}))
        patterns.append(rf"(?:{spellings})" if len(name) <= 4 else rf"[\w-]*(?:{spellings})[\w-]*")
    path = r"[a-z_]\w+(?:\.[a-z_]\w+)+"
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join([path, *patterns])})(?!\w)", re.I)
    return lambda text: pattern.sub(MASK, text)


def _spaced(name: str) -> str:
    return r"[-_ ]".join(map(re.escape, re.split(r"[-_.]", name)))
