"""What a study of MCL shows: scores of every arm on every task at equal steps and at equal compute, differences seed by
seed, and scores against what training cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from studies.mcl_arms import COMPUTE, STEPS
from studies.reporting import chance, plus_minus, spread
from studies.tartan_report import ALL, p_values

BUDGETS = {STEPS: "equal steps", COMPUTE: "equal compute"}


def summarise(records: Sequence[Mapping], arms: Mapping[str, str], against: str) -> list[dict]:
    """Return a row a budget, arm and task, and one over all tasks where every seed has all of them: scores in percent,
    mean and sample standard deviation over seeds, and differences from ``against`` at equal steps, seed by seed."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    test = {(r["arm"], r["budget"], r["seed"], r["task"]): 100 * r["test"] for r in records}
    dev = {(r["arm"], r["budget"], r["seed"], r["task"]): 100 * r["dev"] for r in records}
    for scores in (test, dev):
        for run in {key[:3] for key in scores}:
            own = [scores.get((*run, task)) for task in tasks]
            if len(tasks) > 1 and None not in own:
                scores[(*run, ALL)] = mean(own)
    rows = []
    for budget in BUDGETS:
        for arm, title in arms.items():
            its = [record for record in records if (record["arm"], record["budget"]) == (arm, budget)]
            for task in (ALL, *tasks):
                seeds = sorted({key[2] for key in test if key == (arm, budget, key[2], task)})
                if not seeds:
                    continue
                row = {"budget": budget, "arm": arm, "title": title, "task": task, "runs": len(seeds)}
                row |= {"steps": its[0]["steps"], "flops": mean(record["flops"] for record in its)}
                row |= {"metric": next((r["metric"] for r in its if r["task"] == task), "mean")}
                for name, scores in (("dev", dev), ("test", test)):
                    row |= spread(name, [scores[arm, budget, seed, task] for seed in seeds])
                pairs = [(test[arm, budget, seed, task], test.get((against, STEPS, seed, task))) for seed in seeds]
                gains = [own - other for own, other in pairs if other is not None and arm != against]
                if gains:
                    row |= spread("gain", gains) | {"wins": f"{sum(g > 0 for g in gains)}/{len(gains)}"}
                    row |= p_values(gains)
                row["seconds"] = mean(record["pretraining_seconds"] for record in its)
                rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping], against: str) -> str:
    """Return the table: a line a budget and arm, a column a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    tasks = [task for task in tasks if task != ALL] + [ALL] * (ALL in tasks)
    metrics = {row["task"]: row["metric"] for row in rows}
    head = ["", "arm", "steps", "TFLOPs", *(f"{task}, {metrics[task]}" for task in tasks)]
    head += [f"{tasks[-1]}, against {against}", "p (t)", "s a run"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for budget, title in BUDGETS.items():
        for arm in dict.fromkeys(row["arm"] for row in rows if row["budget"] == budget):
            its = {row["task"]: row for row in rows if (row["budget"], row["arm"]) == (budget, arm)}
            last, first = its.get(tasks[-1], {}), next(iter(its.values()))
            cells = [title, first["title"], str(first["steps"]), f"{first['flops'] / 1e12:.2f}"]
            cells += [plus_minus(its[task], "test") if task in its else "" for task in tasks]
            cells.append(f"{plus_minus(last, 'gain', '+')} ({last['wins']})" if "gain" in last else "")
            cells.append(chance(last.get("p_t")))
            lines.append([*cells, f"{first['seconds']:.0f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(path: Path, rows: Sequence[Mapping], study: Mapping) -> bool:
    """Draw test scores against FLOPs, a panel a task and one for their mean: mean and standard deviation, every seed as
    a dot; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    tasks, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "title"))
    wide = min(3, len(tasks))
    high = -(-len(tasks) // wide)
    figure = Figure(figsize=(3.4 * wide + 1.8, 2.8 * high + 0.6), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        for row in (row for row in rows if row["task"] == task):
            colour, steps = f"C{arms.index(row['title'])}", row["budget"] == STEPS
            style = {"color": colour, "capsize": 3, "markersize": 6}
            face = {"markerfacecolor": colour if steps else "white"}
            x = row["flops"] / 1e12
            axes.errorbar(x, row["test"], yerr=row["test_sd"] or 0, fmt="o" if steps else "s", **style, **face)
            run = [r for r in study["records"] if (r["arm"], r["budget"]) == (row["arm"], row["budget"])]
            dots = [100 * r["test"] for r in run if r["task"] == task]
            axes.plot([x] * len(dots), dots, "_", color=colour, markersize=6, alpha=0.6)
        axes.set_title(task, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    keys = [axes.plot([], [], "o", color=f"C{number}", label=arm)[0] for number, arm in enumerate(arms)]
    keys += [
        axes.plot([], [], mark, color="#555555", markerfacecolor=face, label=BUDGETS[budget])[0]
        for budget, mark, face in ((STEPS, "o", "#555555"), (COMPUTE, "s", "white"))
    ]
    figure.legend(handles=keys, loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel("TFLOPs of pre-training", fontsize=9)
    figure.supylabel("test, % (mean ± sd; dashes: seeds)", fontsize=9)
    figure.savefig(path, dpi=150)
    return True
