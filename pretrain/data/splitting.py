"""Where to cut: long documents into pieces before tokenising, tokenised pieces into samples after it."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from tokenizers import Encoding

PIECE_CHARACTERS = 1 << 16  # the most text that is held and tokenised as one

# The end of a sentence: its mark and closing quotes when no lower-case word follows, an ideographic mark, a blank line.
SENTENCE_END = re.compile(r"""[.!?…]["'”’»)\]]*(?=\s+[^\sa-z])|[。！？][」』”’]*|\n\s*\n""")


def cut_text(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield consecutive parts of ``text``, each of at most ``size`` characters; joined they are ``text`` again.

    A part ends after a line where its second half has a line's end, else after white space, else anywhere.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        half = start + size // 2
        end = text.rfind("\n", half, end) + 1 or text.rfind(" ", half, end) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def cut_tokens(text: str, encoding: Encoding, capacity: int, minimum: int) -> list[tuple[int, int]]:
    """Divide the tokens of ``text`` into the spans ``(start, end)`` of its samples, in order and without a gap.

    Sentences fill a sample as long as they fit. A sentence longer than a sample is cut at the end of a line, else
    between words, else between characters. Offsets are asked of the encoding only near the cuts, which is far
    cheaper than a list of them all.

    Args:
        encoding: of the whole ``text``, without special tokens.
        capacity: the most tokens in a span, at least ``2 * minimum``.
        minimum: the fewest tokens in a span, at least 1; a text of fewer tokens gives no span at all.
    """
    count = len(encoding)
    if count <= capacity:
        return [(0, count)] if count >= minimum else []
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    spans, start = [], 0
    while count - start > capacity:
        limit = min(start + capacity, count - minimum)  # the rest must make a sample as well
        end = _cut(text, ends, encoding, start + minimum, limit)
        spans.append((start, end))
        start = end
    spans.append((start, count))
    return spans


def _cut(text: str, ends: list[int], encoding: Encoding, low: int, high: int) -> int:
    """Return the best token in ``[low, high]`` to begin the next sample with."""
    floor, ceiling = max(_start(encoding, low), 1), _start(encoding, high)
    position = ends[bisect_right(ends, ceiling) - 1] if ends else -1
    if not floor <= position <= ceiling:
        position = text.rfind("\n", floor - 1, ceiling) + 1
    if not floor <= position <= ceiling:
        position = ceiling
        while position >= floor and not text[position : position + 1].isspace():
            position -= 1
    if floor <= position <= ceiling:
        return low + bisect_left(range(low, high), position, key=lambda token: _start(encoding, token))
    for unit in (encoding.token_to_word, encoding.token_to_chars):  # never within a byte-level token's character
        token = high
        while token > low and unit(token) == unit(token - 1):
            token -= 1
        if token > low:
            return token
    return high


def _start(encoding: Encoding, token: int) -> int:
    """Return where ``token`` starts in the text, in characters."""
    return encoding.token_to_chars(token)[0]
