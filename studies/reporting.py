"""What a study shows: a table (Markdown), its numbers (CSV, JSON), a bar plot (PNG)."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

METRICS = {"exact_match": "exact match, %", "token_accuracy": "token accuracy, %", "log_likelihood": "log-likelihood"}
_PERCENT = ("exact_match", "token_accuracy")


def summarise(records: Sequence[Mapping], arms: Mapping[str, str], against: str) -> list[dict]:
    """Return a row an arm: mean and sample standard deviation over seeds of every metric.

    Args:
        records: one an arm and seed: ``arm``, ``seed``, ``score``, ``masks``, ``seconds``, ``loss``.
        arms: arm → title, in the order of the table; those without a record are "not run".
        against: arm whose exact match is subtracted seed by seed.
    """
    by_arm = {arm: {record["seed"]: record for record in records if record["arm"] == arm} for arm in arms}
    rows = []
    for arm, title in arms.items():
        its = by_arm[arm]
        row = {"arm": arm, "title": title, "seeds": len(its)}
        if its:
            for metric in METRICS:
                scale = 100 if metric in _PERCENT else 1
                row |= spread(metric, [scale * record["score"][metric] for record in its.values()])
            common = sorted(set(its) & set(by_arm.get(against, {})))
            if common and arm != against:
                other = by_arm[against]
                gains = [its[s]["score"]["exact_match"] - other[s]["score"]["exact_match"] for s in common]
                row |= spread("gain", [100 * gain for gain in gains])
                row["wins"] = f"{sum(gain > 0 for gain in gains)}/{len(gains)}"
            for key in ("hidden", "answers"):
                shares = [record["masks"][key] for record in its.values() if record["masks"]]
                row[key] = 100 * mean(shares) if shares else None
            row["seconds"] = mean(record["seconds"] for record in its.values())
        rows.append(row)
    return rows


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Return the mean as ``name`` and the sample standard deviation as ``name_sd``; None for a single value."""
    return {name: mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}


def chance(p: float | None) -> str:
    """Return a p-value as a cell of a table."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def markdown(rows: Sequence[Mapping], against: str) -> str:
    """Return the table."""
    head = ["policy", "tokens hidden, %", "answers hidden, %", *METRICS.values(), f"against {against}", "s a seed"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        if not row["seeds"]:
            lines.append([row["title"], "not run", *[""] * (len(head) - 2)])
            continue
        cells = [row["title"], *(_number(row.get(key)) for key in ("hidden", "answers"))]
        cells += [plus_minus(row, metric) for metric in METRICS]
        gain = f"{plus_minus(row, 'gain', '+')} ({row['wins']})" if "gain" in row else ""
        lines.append([*cells, gain, _number(row["seconds"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def plus_minus(row: Mapping, name: str, sign: str = "", digits: int | None = None) -> str:
    """Return a mean ± its standard deviation, as :func:`spread` names them."""
    if digits is None:
        digits = 2 if name == "log_likelihood" else 1
    told = f"{row[name]:{sign}.{digits}f}"
    return told if row[f"{name}_sd"] is None else f"{told} ± {row[f'{name}_sd']:.{digits}f}"


def write(
    folder: Path, name: str, text: str, rows: Sequence[Mapping], study: Mapping, draw: Callable[..., bool]
) -> list[Path]:
    """Write ``name.{md,csv,json,png}``: the text, the rows of its table, the whole study, and what ``draw(file, rows,
    study)`` draws if it can. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for kind in ("md", "csv", "json", "png")]
    files[0].write_text(text, encoding="utf-8")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with open(files[1], "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, keys, lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    files[2].write_text(json.dumps(study, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files if draw(files[3], rows, study) else files[:3]


def plot(path: Path, rows: Sequence[Mapping], study: Mapping) -> bool:
    """Draw exact match with its standard deviation, and every seed as a dot; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    run = [row for row in rows if row["seeds"]]
    figure = Figure(figsize=(7.2, 0.5 * len(run) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(run))
    axes.barh(places, [row["exact_match"] for row in run], color="#9db8d2")
    for place, row in zip(places, run, strict=True):
        axes.errorbar(row["exact_match"], place, xerr=row["exact_match_sd"] or 0, color="#22384d", capsize=4)
        seeds = [100 * r["score"]["exact_match"] for r in study["records"] if r["arm"] == row["arm"]]
        axes.plot(seeds, [place] * len(seeds), "o", color="#22384d", markersize=3, alpha=0.6)
    axes.set_yticks(places, [row["title"] for row in run])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    baseline = 100 * study["commonest_answer"]
    axes.axvline(baseline, color="#b03a2e", linewidth=1, linestyle="--")
    axes.set_xlabel("exact match on test questions, %\n(mean ± sd; dots: seeds; dashed: always the commonest answer)")
    axes.xaxis.label.set_size(8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
