"""The best spans of a text by a score for where they start and one for where they end."""

from typing import NamedTuple

import torch

from pretrain.data.annotations import NO_UNIT
from pretrain.model.vocabulary import Tables


class Borders(NamedTuple):
    """Where spans may begin and end, each ``[rows, length]`` bool."""

    begins: torch.Tensor
    """First tokens of words."""
    ends: torch.Tensor
    """Last tokens of words."""
    text: torch.Tensor
    """Tokens that are text: what a span is made of."""


class Spans(NamedTuple):
    """Spans of each row, the best first, each ``[rows, k]``."""

    first: torch.Tensor
    """int64 place of the first token; −1 where the row has no further span."""
    last: torch.Tensor
    """int64 place of the last token; −1 where there is none."""
    scores: torch.Tensor
    """−∞ where there is none."""


def borders(tokens: torch.Tensor, real: torch.Tensor, tables: Tables) -> Borders:
    """Find the words of ``tokens [rows, length]``, one sample a row; ``real`` is false on padding."""
    text = tables.is_ordinary[tokens] & real
    begins = text & ~(tables.continues_word[tokens] & _shifted(text, 1))
    return Borders(begins, text & ~_shifted(text & ~begins, -1), text)


def _shifted(values: torch.Tensor, places: int) -> torch.Tensor:
    """Move the values of each row to the right, or to the left if ``places`` is negative; false comes in."""
    moved = torch.nn.functional.pad(values, (max(places, 0), max(-places, 0)))
    return moved[:, : values.shape[1]] if places > 0 else moved[:, -places:]


def span_scores(start: torch.Tensor, end: torch.Tensor, found: Borders, max_span: int) -> torch.Tensor:
    """Return ``start[i] + end[i + n]`` as ``[rows, length, max_span]`` (row, i, n), −∞ where that is no span.

    A span is made of text and of whole words.
    """
    lowest = float("-inf")
    interruptions = (~found.text).cumsum(1)
    start, end = start.masked_fill(~found.begins, lowest), end.masked_fill(~found.ends, lowest)
    reach, length = (0, max_span), start.shape[1]
    ends = torch.nn.functional.pad(end, reach, value=lowest).unfold(1, max_span, 1)[:, :length]
    there = torch.nn.functional.pad(interruptions, reach, value=-1).unfold(1, max_span, 1)[:, :length]
    return (start[:, :, None] + ends).masked_fill(there != interruptions[:, :, None], lowest)


def top_spans(scores: torch.Tensor, k: int) -> Spans:
    """Choose in each row the best span, then the best that does not overlap it, and so on; ``k`` at most.

    Of equals the first in the text is taken, and of those that begin alike the shortest.

    Args:
        scores: of :func:`span_scores`; not changed.
    """
    rows, length, max_span = scores.shape
    found = [scores.new_full((rows, k), -1, dtype=torch.int64) for _ in range(2)]
    best = scores.new_full((rows, k), float("-inf"))
    if scores.numel() == 0:
        return Spans(*found, best)
    left = scores.clone()
    firsts = torch.arange(length, device=scores.device)[None, :, None]
    lasts = firsts + torch.arange(max_span, device=scores.device)
    for number in range(k):
        best[:, number], place = left.flatten(1).max(1)
        first = place // max_span
        last = first + place % max_span
        none = best[:, number] == float("-inf")
        found[0][:, number], found[1][:, number] = first.masked_fill(none, -1), last.masked_fill(none, -1)
        left.masked_fill_((firsts <= last[:, None, None]) & (lasts >= first[:, None, None]), float("-inf"))
    return Spans(*found, best)


def units_of(spans: Spans, length: int) -> torch.Tensor:
    """Number the spans of each row in the order of the text: ``[rows, length]`` int64, ``NO_UNIT`` outside them."""
    rows = len(spans.first)
    edges = spans.first.new_zeros(2, rows, length + 2)  # one place at the left takes what is no span
    edges[0].scatter_(1, spans.first + 1, 1)
    edges[1].scatter_(1, (spans.last + 2) * (spans.last >= 0), 1)
    edges[:, :, 0] = 0
    begun, ended = edges[:, :, 1:-1].cumsum(2)
    return torch.where(begun > ended, begun - 1, NO_UNIT)
