"""What a study of PRESENCE shows: held-out losses and scores of every arm at equal steps and at equal compute,
differences seed by seed, and how well scores tell spoilt samples from clean ones as training goes on."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from studies.planting import TROUBLES
from studies.presence_arms import AGAINST, COMPUTE, SIGNALS, STEPS
from studies.reporting import chance, plus_minus, spread
from studies.tartan_report import p_values

MEASURES = {"heldout_loss": (1, -1), "test": (100, 1)}
"""Measure → its scale, and whether more of it is better (1) or worse (−1)."""
BUDGETS = {STEPS: "equal steps", COMPUTE: "equal compute"}


def summarise(records: Sequence[Mapping], arms: Mapping[str, str], against: str) -> list[dict]:
    """Return a row an arm and budget: mean and sample standard deviation over seeds of its measures, of their
    differences from ``against`` seed by seed, of its weights by kind of sample, and of its last AUROCs."""
    by_run = {(record["arm"], record["budget"], record["seed"]): record for record in records}
    rows = []
    for budget in BUDGETS:
        for arm, title in arms.items():
            its = [record for record in records if (record["arm"], record["budget"]) == (arm, budget)]
            if not its:
                continue
            row = {"budget": budget, "arm": arm, "title": title, "runs": len(its), "steps": its[0]["steps"]}
            for name, (scale, better) in MEASURES.items():
                row |= spread(name, [scale * record[name] for record in its])
                pairs = [(record, by_run.get((against, STEPS, record["seed"]))) for record in its if arm != against]
                gains = [scale * (record[name] - other[name]) for record, other in pairs if other]
                if gains:
                    chances = {f"{name}_{key}": value for key, value in p_values(gains).items()}
                    row |= spread(f"{name}_gain", gains) | chances
                    row[f"{name}_wins"] = f"{sum(better * gain > 0 for gain in gains)}/{len(gains)}"
            row |= spread("effective_sample_size", [record["effective_sample_size"] for record in its])
            for kind in ("clean", *TROUBLES):
                weights = [record["weights"][kind] for record in its if kind in (record["weights"] or ())]
                row |= spread(f"weight_{kind}", weights) if weights else {}
            for signal, trouble in product(SIGNALS, _troubles(its)):
                last = [record["detection"][-1][signal][trouble] for record in its]
                row |= spread(f"auroc_{signal}_{trouble}", last)
            row["seconds"] = float(np.mean([record["seconds"] for record in its]))
            rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping], records: Sequence[Mapping], against: str) -> str:
    """Return the tables: what was reached, what counted how much, what the scores tell."""
    return "\n".join(filter(None, (_reached(rows, against), _weights(rows), _told_apart(records))))


def _reached(rows: Sequence[Mapping], against: str) -> str:
    metric = f"against {against}"
    head = ["", "weights", "steps", "held-out loss", metric, "p (t)", "end task, %", metric, "p (t)", "s a run"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for row in rows:
        cells = [BUDGETS[row["budget"]], row["title"], str(row["steps"])]
        for name, digits in (("heldout_loss", 3), ("test", 1)):
            cells.append(plus_minus(row, name, digits=digits))
            gain = f"{name}_gain"
            cells.append(f"{plus_minus(row, gain, '+', digits)} ({row[f'{name}_wins']})" if gain in row else "")
            cells.append(chance(row.get(f"{name}_p_t")))
        lines.append([*cells, f"{row['seconds']:.0f}"])
    return _table(lines)


def _weights(rows: Sequence[Mapping]) -> str:
    """Return the table of mean weights by kind of sample, at equal steps."""
    kinds = [kind for kind in ("clean", *TROUBLES) if any(f"weight_{kind}" in row for row in rows)]
    if not kinds:
        return ""
    lines = [["mean weight of", *kinds, "effective sample size"], ["---", *["---:"] * (1 + len(kinds))]]
    for row in rows:
        if row["budget"] == STEPS and "weight_clean" in row:
            told = [f"weight_{kind}" for kind in kinds]
            cells = [plus_minus(row, name, digits=2) if name in row else "" for name in told]
            lines.append([row["title"], *cells, plus_minus(row, "effective_sample_size", digits=2)])
    return _table(lines)


def _told_apart(records: Sequence[Mapping]) -> str:
    """Return the table of AUROCs in the course of training with uniform weights, or with those that were run."""
    scored = [record for record in records if record["detection"]]
    its = [record for record in scored if record["arm"] == AGAINST] or scored
    fractions = sorted({point["fraction"] for record in its for point in record["detection"]})
    head = ["AUROC against clean", "score", *(f"{100 * fraction:.0f} %" for fraction in fractions)]
    lines = [head, ["---"] * 2 + ["---:"] * len(fractions)]
    for trouble in _troubles(its):
        for signal in SIGNALS:
            cells = [plus_minus(point, "auroc", digits=2) for point in _course(its, signal, trouble).values()]
            lines.append([trouble, signal, *cells])
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _troubles(records: Sequence[Mapping]) -> list[str]:
    found = {trouble for record in records for point in record["detection"] for trouble in point[SIGNALS[0]]}
    return [trouble for trouble in ("all", *TROUBLES) if trouble in found]


def _course(records: Sequence[Mapping], signal: str, trouble: str) -> dict[float, dict]:
    """Return part of the run → mean AUROC over records, and its standard deviation."""
    by_fraction: dict[float, list[float]] = {}
    for record in records:
        for point in record["detection"]:
            by_fraction.setdefault(point["fraction"], []).append(point[signal][trouble])
    return {fraction: spread("auroc", values) for fraction, values in sorted(by_fraction.items())}


def plot(path: Path, rows: Sequence[Mapping], study: Mapping) -> bool:
    """Draw AUROCs in the course of training, a panel a trouble, and held-out losses; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    scored = [record for record in study["records"] if record["detection"]]
    troubles = [trouble for trouble in _troubles(scored) if trouble != "all"]
    figure = Figure(figsize=(3.0 * len(troubles) + 4.6, 3.6), layout="constrained")
    *panels, losses = figure.subplots(1, len(troubles) + 1, width_ratios=[1] * len(troubles) + [1.5])
    titles = {row["arm"]: row["title"] for row in rows}
    for trouble, axes in zip(troubles, panels, strict=True):
        for number, (arm, title) in enumerate(titles.items()):
            its = [record for record in scored if record["arm"] == arm]
            _draw_course(axes, its, "influence", trouble, f"C{number}", "-", title)
        uniform = [record for record in scored if record["arm"] == AGAINST]
        _draw_course(axes, uniform, "loss", trouble, "C0", ":", "uniform, by the loss")
        axes.axhline(0.5, color="#999999", linewidth=0.8)
        axes.set_title(f"{trouble} against clean", fontsize=9)
        axes.set_xlabel("part of the run", fontsize=8)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("AUROC of the self-influence (mean ± sd)", fontsize=8)
    panels[0].legend(fontsize=6, frameon=False)
    _draw_losses(losses, rows, study["records"])
    for axes in (*panels, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def _draw_course(axes, records: Sequence[Mapping], signal: str, trouble: str, colour: str, style: str, label: str):
    course = _course(records, signal, trouble) if records else {}
    means, deviations = ([point[key] or 0 for point in course.values()] for key in ("auroc", "auroc_sd"))
    axes.errorbar(list(course), means, deviations, color=colour, linestyle=style, linewidth=1.2, label=label)


def _draw_losses(axes, rows: Sequence[Mapping], records: Sequence[Mapping]) -> None:
    for place, row in enumerate(rows):
        colour = "#22384d" if row["budget"] == STEPS else "#d1495b"
        its = [r["heldout_loss"] for r in records if (r["arm"], r["budget"]) == (row["arm"], row["budget"])]
        axes.errorbar(row["heldout_loss"], place, xerr=row["heldout_loss_sd"] or 0, fmt="s", color=colour, capsize=3)
        axes.plot(its, [place] * len(its), "o", color=colour, markersize=3, alpha=0.5)
    axes.set_yticks(range(len(rows)), [f"{row['title']}, {BUDGETS[row['budget']]}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss on clean text (mean ± sd; dots: seeds)", fontsize=8)
