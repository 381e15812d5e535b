"""How well chosen spans meet the answers, and random spans of the same lengths."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fused_objectives.philox import below, philox
from pretrain.masking.learning.spans import Borders
from pretrain.masking.learning.windows import Window

Places = list[tuple[int, int]]
"""(first, last) places of spans in a window, the best first."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_spans(windows: Sequence[Window], chosen: Sequence[Places], k: int) -> dict[str, float]:
    """Compare the spans chosen in each window with its answers.

    Returns:
        ``exact_match`` and ``f1`` of the best span's text, as SQuAD measures them (the best over a window's answers,
        mean over windows); ``recall_at_1`` and ``recall_at_k``, the fraction of all answers that are, token for
        token, the best span or one of the ``k`` best.
    """
    exact = overlap = first = among = 0
    for window, spans in zip(windows, chosen, strict=True):
        answers = [window.text(*answer) for answer in window.answers]
        best = window.text(*spans[0]) if spans else ""
        exact += max(normalised(best) == normalised(answer) for answer in answers)
        overlap += max(token_f1(best, answer) for answer in answers)
        first += len(set(window.answers).intersection(spans[:1]))
        among += len(set(window.answers).intersection(spans[:k]))
    answers = sum(len(window.answers) for window in windows)
    return {
        "exact_match": exact / len(windows),
        "f1": overlap / len(windows),
        "recall_at_1": first / answers,
        "recall_at_k": among / answers,
    }


def normalised(text: str) -> str:
    """Return an answer as SQuAD compares it: lower case, without punctuation and articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(found: str, answer: str) -> float:
    """Return the F1 of the words of two answers, each word as often as it occurs; 1 if both have none."""
    ours, theirs = normalised(found).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def random_spans(like: Places, found: Borders, row: int, seed: int, window: int) -> Places:
    """Return spans of the lengths of ``like``, in its order, at random among the places where they may lie.

    They are made of whole words and do not overlap; one that has no place left is missing.

    Args:
        found: where spans may lie in the windows of a batch, on the CPU.
        row: the window's row in it.
        window: its number, which with ``seed`` decides the draws.
    """
    begins, ends, free = (which[row].numpy() for which in (found.begins, found.ends, found.text.clone()))
    spans = []
    for number, (first, last) in enumerate(like):
        length = last - first + 1
        taken = np.cumsum(~free, dtype=np.int64)
        taken = np.concatenate([[0], taken])
        possible = begins[: len(begins) - length + 1] & ends[length - 1 :] & (taken[length:] == taken[:-length])
        places = np.flatnonzero(possible)
        if len(places):
            word = philox(seed, "random spans", np.array([number]), window)[0]
            place = int(places[int(below(word, len(places))[0])])
            free[place : place + length] = False
            spans.append((place, place + length - 1))
    return spans
