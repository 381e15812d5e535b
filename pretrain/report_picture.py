"""The picture of ``medley report``: losses, the sampler's probabilities and what it learnt from, over the steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANEL = (9.0, 2.6)  # inches
SMOOTHING = 0.02  # of the run: a moving mean's length

Series = dict[str, tuple[np.ndarray, np.ndarray]]
"""Name → steps and numbers."""


def draw_run(records: list[dict], path: Path) -> Path:
    """Draw a run's ``metrics.jsonl`` as one PNG, a panel for each of what it holds; return its path.

    The panels are training losses (a moving mean) with the held-out ones as dots, probabilities of more than one
    objective, and everything the sampler told: rewards, credits, alignments.
    """
    panels = [("loss", lambda axes, colours: _draw_losses(axes, colours, records))]
    if len(probabilities := _series(records, lambda record: record.get("probabilities"))) > 1:
        panels.append(("probability", lambda axes, colours: _draw_lines(axes, colours, probabilities)))
    for kind in dict.fromkeys(kind for record in records for kind in record.get("sampler") or {}):
        told = _series(records, lambda record, kind=kind: (record.get("sampler") or {}).get(kind))
        panels.append((kind, lambda axes, colours, told=told: _draw_lines(axes, colours, told)))
    names = dict.fromkeys(name for record in records for name in record["losses"])
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    figure = Figure(figsize=(PANEL[0], PANEL[1] * len(panels)), layout="constrained")
    for axes, (title, draw) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        draw(axes, colours)
        axes.set_ylabel(title.replace("_", " "))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=130)
    return path


def _series(records: list[dict], of: Callable[[dict], dict | None]) -> Series:
    """Collect, for each name that ``of`` a record holds, its finite numbers over the steps."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, number in (of(record) or {}).items():
            if number is not None:
                points.setdefault(name, []).append((record["step"], number))
    return {name: (np.array([s for s, _ in each]), np.array([n for _, n in each])) for name, each in points.items()}


def _draw_losses(axes: Axes, colours: dict[str, str], records: list[dict]) -> None:
    for name, (steps, losses) in _series(records, lambda record: record["losses"]).items():
        length = max(1, min(len(losses), round(SMOOTHING * len(records))))
        sums = np.concatenate([[0.0], np.cumsum(losses)])
        axes.plot(steps[length - 1 :], (sums[length:] - sums[:-length]) / length, color=colours[name], label=name)
    for name, (steps, losses) in _series(records, lambda record: record.get("heldout")).items():
        axes.plot(steps, losses, "o", color=colours.get(name), markersize=4)


def _draw_lines(axes: Axes, colours: dict[str, str], series: Series) -> None:
    style = "-" if max((len(steps) for steps, _ in series.values()), default=0) > 60 else ".-"
    for name, (steps, numbers) in series.items():
        axes.plot(steps, numbers, style, color=colours.get(name), linewidth=1.2, label=name)
