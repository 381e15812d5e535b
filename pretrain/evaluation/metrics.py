"""Scores of predictions, their mean and spread over seeds, and the baseline that looks at no text."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

CLASSIFICATION = ("accuracy", "macro_f1", "micro_f1", "matthews")
REGRESSION = ("spearman", "pearson")


@dataclass(frozen=True)
class Scores:
    """Values by metric, and the metrics among them that were undefined and therefore set to 0."""

    values: dict[str, float]
    undefined: tuple[str, ...] = ()


def metric_names(regression: bool) -> tuple[str, ...]:
    """Return the metrics of a kind of task; the first one chooses the epoch unless the user says otherwise."""
    return REGRESSION if regression else CLASSIFICATION


def score(predictions: np.ndarray, labels: np.ndarray, regression: bool) -> Scores:
    """Compare ``predictions [samples]`` with ``labels [samples]``: class indices, or floats for regression.

    Macro-F1 averages over the classes that occur among labels or predictions. Micro-F1 over all classes equals
    accuracy. Where predictions or labels are constant, or predictions are not finite, a correlation is undefined
    and becomes 0.

    Raises:
        ValueError: if there are no samples or the lengths differ.
    """
    from scipy import stats  # here, since every run comes by this module and few need what takes so long to import
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be equal, flat, not empty")
    constant = len(np.unique(predictions)) < 2 or len(np.unique(labels)) < 2
    if regression:
        if constant or not np.isfinite(predictions).all():
            return Scores(dict.fromkeys(REGRESSION, 0.0), REGRESSION)
        correlations = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}
        return Scores({name: float(correlations[name](predictions, labels).statistic) for name in REGRESSION})
    values = {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro")),
        "micro_f1": float(f1_score(labels, predictions, average="micro")),
        "matthews": 0.0 if constant else float(matthews_corrcoef(labels, predictions)),
    }
    return Scores(values, ("matthews",) if constant else ())


def baseline(train_labels: list, test_labels: list, regression: bool) -> Scores:
    """Score the predictor that gives every sample the commonest class of train (the lowest of equals), or its mean."""
    guess = float(np.mean(train_labels)) if regression else int(np.bincount(train_labels).argmax())
    return score(np.full(len(test_labels), guess), np.asarray(test_labels), regression)


def summarise(runs: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Return mean and sample standard deviation (ddof = 1; None for a single run) of every metric over the runs."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    mean = {name: float(np.mean(values)) for name, values in columns.items()}
    sd = {name: float(np.std(values, ddof=1)) if len(runs) > 1 else None for name, values in columns.items()}
    return mean, sd


def undefined_note(split: str, runs: list[Scores]) -> str | None:
    """Say in one sentence which metrics were undefined in how many runs; None if none was."""
    counts = Counter(name for run in runs for name in run.undefined)
    if not counts:
        return None
    told = ", ".join(f"{name} in {count} of {len(runs)}" for name, count in counts.items())
    return f"{split}: undefined for constant predictions or labels, counted as 0: {told}"
