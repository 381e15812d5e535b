"""What a study of TARTAN shows: scores of every arm on every task, differences seed by seed, and whether they are more
than chance."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from studies.reporting import chance, plus_minus, spread

ALL = "all tasks"
_EXACT = 1e5  # sign patterns that are enumerated; beyond, so many are drawn


def summarise(records: Sequence[Mapping], arms: Mapping[str, str], against: str) -> list[dict]:
    """Return a row a task and arm, and a row an arm over all tasks: scores in percent, mean and sample standard
    deviation over seeds; differences from ``against`` by task and seed, and their p-values."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    scores = {(r["task"], r["arm"], r["seed"]): r for r in records}
    rows = []
    for task in [*tasks, *([ALL] if len(tasks) > 1 else [])]:
        for arm, title in arms.items():
            its = [r for r in records if r["arm"] == arm and task in (r["task"], ALL)]
            row = {"task": task, "arm": arm, "title": title, "runs": len(its)}
            if its and task != ALL:
                row |= spread("dev", [100 * r["dev"] for r in its]) | spread("test", [100 * r["test"] for r in its])
                row |= {"metric": its[0]["metric"], "passes": its[0]["passes"]}
                row["seconds"] = float(np.mean([r["seconds"] for r in its]))
            pairs = [(r, scores.get((r["task"], against, r["seed"]))) for r in its if arm != against]
            gains = [100 * (r["test"] - other["test"]) for r, other in pairs if other]
            if gains:
                row |= spread("gain", gains) | {"wins": f"{sum(g > 0 for g in gains)}/{len(gains)}"} | p_values(gains)
            rows.append(row)
    return rows


def p_values(gains: Sequence[float]) -> dict[str, float | None]:
    """Return two-sided p-values that the mean of paired differences is 0: Student's t, and all flips of their signs."""
    if len(gains) < 2 or np.ptp(gains) == 0:
        return {"p_t": None, "p_flips": None}
    values = np.array(gains)
    flips = stats.permutation_test(
        (values, np.zeros_like(values)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if 2.0 ** len(values) <= _EXACT else int(_EXACT),
        rng=np.random.default_rng(0),
    )
    return {"p_t": float(stats.ttest_1samp(values, 0.0).pvalue), "p_flips": float(flips.pvalue)}


def markdown(rows: Sequence[Mapping], against: str) -> str:
    """Return the table."""
    head = ["task", "arm", "metric", "dev, %", "test, %", f"against {against}", "p (t)", "p (signs)", "s a seed"]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for row in rows:
        scores = [plus_minus(row, name) if name in row else "" for name in ("dev", "test")]
        gain = f"{plus_minus(row, 'gain', '+')} ({row['wins']})" if "gain" in row else ""
        chances = [chance(row.get(key)) for key in ("p_t", "p_flips")]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append([row["task"], row["title"], row.get("metric", ""), *scores, gain, *chances, seconds])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(path: Path, rows: Sequence[Mapping], study: Mapping) -> bool:
    """Draw test scores by task: mean and standard deviation, every seed as a dot, the majority's score as a line; False
    without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    tasks = list(dict.fromkeys(row["task"] for row in rows if "test" in row))
    figure = Figure(figsize=(3.2 * max(2, len(tasks)), 3.2), layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        its = [row for row in rows if row["task"] == task and "test" in row]
        for place, row in enumerate(its):
            axes.bar(place, row["test"], color="#9db8d2")
            axes.errorbar(place, row["test"], yerr=row["test_sd"] or 0, color="#22384d", capsize=4)
            dots = [100 * r["test"] for r in study["records"] if (r["task"], r["arm"]) == (task, row["arm"])]
            axes.plot([place] * len(dots), dots, "o", color="#22384d", markersize=3, alpha=0.6)
        majority = [100 * r["majority"] for r in study["records"] if r["task"] == task]
        axes.axhline(majority[0], color="#b03a2e", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(its)), [row["arm"] for row in its])
        axes.set_title(f"{task}, {its[0]['metric']}", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.supylabel("test, % (mean ± sd; dots: seeds; dashed: the majority)", fontsize=8)
    figure.savefig(path, dpi=150)
    return True
