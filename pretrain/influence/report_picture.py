"""The pictures of ``medley influence``."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = (10.0, 7.2)  # inches
BINS = 40
MOST_POINTS = 4000  # of a scatter


def draw(records: Sequence[dict], metrics: Sequence[dict], floor: float | None) -> str:
    """Draw what one objective's ``records`` hold of samples, and the run's ``metrics``, as one PNG; return it in
    base64.

    The panels are the scores' distribution, early and late in the run; effective sample size, with the ``floor`` that
    is warned of, and temperature over the steps; scores against lengths (of micro-batches: targets) and losses.
    """
    figure = Figure(figsize=PANELS, layout="constrained")
    axes = figure.subplots(2, 2).flat
    _draw_scores(axes[0], records)
    _draw_sizes(axes[1], metrics, floor)
    length = "lengths" if "lengths" in records[0] else "targets"
    steps = np.concatenate([np.full(len(each["scores"]), each["step"]) for each in records])
    scores = gathered(records, "scores")
    points = None
    for panel, name, label in ((axes[2], length, f"{length[:-1]}, tokens"), (axes[3], "losses", "loss a target")):
        points = _draw_against(panel, gathered(records, name), scores, steps, label)
    if points is not None:
        figure.colorbar(points, ax=[axes[2], axes[3]], label="step", shrink=0.9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode()


def gathered(records: Sequence[dict], name: str) -> np.ndarray:
    """Return a column of all records one after another, fp64; NaN where there is no number."""
    return np.array([np.nan if each is None else each for record in records for each in record[name]], np.float64)


def _draw_scores(axes: Axes, records: Sequence[dict]) -> None:
    third = max(1, len(records) // 3)
    parts = [records] if len(records) < 3 else [records[:third], records[-third:]]
    scores = [gathered(part, "scores") for part in parts]
    positive = [each[each > 0] for each in scores]
    together = np.concatenate(positive)
    if not len(together):
        return
    bins = np.geomspace(together.min(), together.max() * (1 + 1e-9), BINS)
    for part, found in zip(parts, positive, strict=True):
        first, last = part[0]["step"], part[-1]["step"]
        axes.hist(found, bins, histtype="stepfilled", alpha=0.45, density=False, label=f"steps {first} to {last}")
    axes.set(xscale="log", xlabel="score", ylabel="samples" if "lengths" in records[0] else "micro-batches")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, loc="upper left")


def _draw_sizes(axes: Axes, metrics: Sequence[dict], floor: float | None) -> None:
    steps = [each["step"] for each in metrics]
    axes.plot(steps, [each["effective_sample_size"] for each in metrics], color="C0", linewidth=1.0)
    if floor:
        axes.axhline(floor, color="C3", linestyle=":", linewidth=1.0, label="weigher.floor")
        axes.legend(frameon=False, loc="lower right")
    axes.set(ylim=(0, 1.05), xlabel="step", ylabel="effective sample size")
    axes.yaxis.label.set_color("C0")
    axes.grid(alpha=0.3)
    temperature = axes.twinx()
    drawn = {"color": "C1", "linestyle": "--", "linewidth": 1.2, "drawstyle": "steps-mid"}
    temperature.plot(steps, [each["weigher"]["temperature"] for each in metrics], **drawn)
    temperature.set_ylabel("temperature", color="C1")
    temperature.margins(y=0.15)


def _draw_against(axes: Axes, values: np.ndarray, scores: np.ndarray, steps: np.ndarray, label: str):
    shown = np.flatnonzero(np.isfinite(values) & (scores > 0))
    shown = shown[:: max(1, len(shown) // MOST_POINTS)]
    axes.set(xlabel=label, ylabel="score")
    if not len(shown):
        return None
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    return axes.scatter(values[shown], scores[shown], 5, steps[shown], cmap="viridis", alpha=0.6, linewidths=0)
