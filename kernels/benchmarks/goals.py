"""The goals, judged by what one run measured on a GPU."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from cases import EMPTY_LAUNCH, FORWARD, TRAINING, Scale, text_of
from losses import GEMMS
from norms import EXACT, SKETCHED
from records import FLOOR, GRAPH, PEAK, TIME, Record

_BASE = Scale()
_HEAD = text_of(_BASE.base("tokens", "d", "V", "rate"))
_ROWS = text_of(_BASE.base("tokens", "length", "rate"))
_LAYER = text_of(_BASE.base("tokens", "d", "length"))
_WIDE = text_of(_BASE.base("tokens", "d"))
CORRUPTIONS = "mask", "swap", "insert", "delete", "replace"


class Results:
    """Medians of a run."""

    def __init__(self, records: Iterable[Record]):
        self._medians = {(*record[:4], record.metric): record.p50 for record in records}

    def median(self, op: str, provider: str, mode: str, shape: str, metric: str = TIME) -> float:
        """Raises ``KeyError`` where nothing was measured."""
        return self._medians[op, provider, mode, shape, metric]

    def others(self, op: str, mode: str, shape: str, metric: str) -> list[float]:
        """Return what the peers took: neither ours nor the floor."""
        found = [
            value
            for (name, provider, *rest), value in self._medians.items()
            if name == op and rest == [mode, shape, metric] and not provider.startswith(("medley", GEMMS))
        ]
        if not found:
            raise KeyError(op)
        return found


class Goal(NamedTuple):
    """A bound on a ratio of what was measured."""

    text: str
    ratio: Callable[[Results], float]
    bound: float
    at_least: bool = False


def _head(results: Results, other: str) -> float:
    return results.median("linear_ce", other, TRAINING, _HEAD) / results.median("linear_ce", "medley", TRAINING, _HEAD)


def _memory(results: Results) -> float:
    leanest = min(results.others("linear_ce", TRAINING, _HEAD, PEAK))
    return results.median("linear_ce", "medley", TRAINING, _HEAD, PEAK) / leanest


def _launches(results: Results) -> float:
    """Of the slowest corruption."""
    return max(
        results.median(op, "medley", FORWARD, shape, GRAPH)
        / results.median(op, EMPTY_LAUNCH.name, FORWARD, shape, GRAPH)
        for op in CORRUPTIONS
        for shape in [_ROWS + " policy=token" * (op == "mask")]
    )


def _collator(results: Results) -> float:
    shape = _ROWS + " policy=token"
    return results.median("mask", "transformers", FORWARD, shape) / results.median("mask", "medley", FORWARD, shape)


def _layer(mode: str) -> Callable[[Results], float]:
    def ratio(results: Results) -> float:
        reference = results.median("bert_layer", "torch", TRAINING, _LAYER)
        return results.median("bert_layer", "medley", mode, _LAYER) / reference

    return ratio


GOALS = [
    Goal("masked linear cross entropy: time of its three GEMMs alone, times", lambda r: 1 / _head(r, GEMMS), 1.25),
    Goal("masked linear cross entropy: faster than Liger at 15 % masking, times", lambda r: _head(r, "Liger"), 3, True),
    Goal("masked linear cross entropy: peak memory of the leanest peer, times", _memory, 1.2),
    Goal("corruption: time of one empty launch, times (the slowest of five)", _launches, 2),
    Goal("corruption: faster than the eager collator on the same device, times", _collator, 10, True),
    Goal(
        "detection: fraction of the copy bandwidth",
        lambda r: r.median("detection", "medley", TRAINING, _WIDE, FLOOR),
        0.7,
        True,
    ),
    Goal("exact norms of a BERT-base layer: fraction of its forward and backward", _layer(EXACT), 0.4),
    Goal("sketched norms of a BERT-base layer: fraction of its forward and backward", _layer(SKETCHED), 0.06),
]


def judge(records: Iterable[Record]) -> list[str]:
    """Return a line for every goal: met, not met, or not measured."""
    results = Results(records)
    return [_line(goal, results) for goal in GOALS]


def _line(goal: Goal, results: Results) -> str:
    bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
    try:
        ratio = goal.ratio(results)
    except KeyError:
        return f"  {'not measured':14}{goal.text} {bound}"
    met = ratio >= goal.bound if goal.at_least else ratio <= goal.bound
    return f"  {'met' if met else 'not met':14}{goal.text} {bound}: {ratio:.3g}"
