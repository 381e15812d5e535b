"""Samplers on a training in miniature in which it is known what each objective is worth (``benchmarks/testbed.py``).

    python -m benchmarks.samplers

Defaults of samplers were chosen on seeds from 100 on; results are of seeds from 0 on.
"""

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, append_result, environment, print_table
from benchmarks.testbed import ALIKE, MIXED, STEEP, STEPS, Objective, Trace, run, run_mixtures
from pretrain.sampling import build_sampler, parse_sampler

SCENES = {"mixed": MIXED, "steep": STEEP, "alike": ALIKE}
NEW_ROWS = "gradients, new rows"
SAMPLERS: dict[str, dict] = {
    "uniform": {"name": "uniform"},
    "round_robin": {"name": "round_robin"},
    "loss_proportional": {"name": "loss_proportional"},
    "odm": {"name": "odm"},
    "aioli": {"name": "aioli"},
    "pike, draw": {"name": "pike", "mode": "draw"},
    "mometas, paper": {"name": "mometas", "reward": "paper"},
    "mometas, bursts": {"name": "mometas", "credit": "bursts"},
    "mometas, gradients": {"name": "mometas", "credit": "gradients"},
    f"mometas, {NEW_ROWS}": {"name": "mometas", "credit": "gradients"},
    "random_reward, paper": {"name": "random_reward", "reward": "paper"},
    "random_reward, bursts": {"name": "random_reward", "credit": "bursts"},
    "fixed, mix": {"name": "fixed"},
    "pike, mix": {"name": "pike"},
    f"mometas, {NEW_ROWS}, mix": {"name": "mometas", "mode": "mix"},
}
BEST = "best fixed mixture"
SEARCH_SEEDS = range(100, 104)
COLOURS = ("#d1495b", "#edae49", "#1d3f72", "#2a9d8f", "#999999")


def main() -> None:
    """Run all samplers, print the table, add it to benchmarks/results/samplers.json and draw their shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="runs of each sampler")
    parser.add_argument("--first-seed", type=int, default=0, metavar="SEED", help="of these runs")
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=SCENES, help="which testbeds")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of a run")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = []
    for scene in args.scenes:
        best = {mode: best_mixture(SCENES[scene], args.steps, mode) for mode in ("draw", "mix")}
        reached = {mode: run_mixtures(best[mode][None], SCENES[scene], seeds, args.steps, mode)[0] for mode in best}
        traces = {}
        for name, keys in SAMPLERS.items():
            traces[name] = trace(keys, SCENES[scene], seeds, args.steps, NEW_ROWS in name)
            mode = "mix" if name.endswith("mix") else "draw"
            rows.append({"scene": scene, "sampler": name, **summary(traces[name], reached[mode])})
            print(" | ".join(rows[-1].values()), flush=True)
        for mode, mixture in best.items():
            told = f"{BEST}, {mode}: " + " ".join(f"{share:.1f}" for share in mixture)
            first = f"{mixture[0]:.2f}"
            totals = plus_minus(reached[mode])
            rows.append({"scene": scene, "sampler": told, **dict.fromkeys(COLUMNS, ""), TOTAL: totals, SHARE: first})
        print(f"drew {draw(scene, traces, list(SCENES[scene]))}")
    print_table(rows)
    setup = {"steps": args.steps, "seeds": [seeds.start, seeds.stop], "search_seeds": list(SEARCH_SEEDS)}
    print(f"added to {append_result('samplers', {**environment(), 'setup': setup, 'results': rows})}")


def trace(keys: dict, objectives: dict[str, Objective], seeds: range, steps: int, new_rows: bool = False) -> Trace:
    """Train with one of the samplers."""
    config = parse_sampler(keys, "benchmark")
    return run(
        lambda names, seed, steps: build_sampler(config, names, seed, steps),
        objectives,
        seeds,
        steps,
        new_rows=new_rows,
    )


SHARE, EARLY, TOTAL, REGRET, DISTANCE, WORST = COLUMNS = (
    "share of the first",
    "probability at 30 %",
    "sum of losses",
    "regret",
    "distance from uniform",
    "largest",
)


def summary(traced: Trace, reached: np.ndarray) -> dict[str, str]:
    """Return what the table tells of a sampler: means over seeds and their 95 % intervals.

    ``distance from uniform`` is of the most distant probability, mean over the run, and ``largest`` of all runs.
    """
    third = math.ceil(0.3 * len(traced.probabilities)) - 1
    distance = np.abs(traced.probabilities - 1 / traced.probabilities.shape[-1]).max(-1)
    return {
        SHARE: plus_minus(traced.shares[..., 0].mean(0)),
        EARLY: plus_minus(traced.probabilities[third, :, 0]),
        TOTAL: plus_minus(traced.totals),
        REGRET: plus_minus(traced.totals - reached),
        DISTANCE: f"{distance.mean():.3f}",
        WORST: f"{distance.max():.3f}",
    }


def half_width(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return half the width of the 95 % interval of means over seeds (normal)."""
    return 1.96 * values.std(axis, ddof=1) / math.sqrt(values.shape[axis])


def plus_minus(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {half_width(values):.3f}"


def best_mixture(objectives: dict[str, Objective], steps: int, mode: str) -> np.ndarray:
    """Return the best of all fixed mixtures in fifths, and of its neighbours a tenth away, on other seeds than those
    of the results; the uniform one if all objectives are the same."""
    count = len(objectives)
    if len(set(objectives.values())) == 1:
        return np.full(count, 1 / count)
    fifths = [each for each in itertools.product(range(6), repeat=count) if sum(each) == 5]
    coarse = np.array(fifths) / 5
    start = coarse[run_mixtures(coarse, objectives, SEARCH_SEEDS[:1], steps, mode).mean(-1).argmin()]
    moves = [np.eye(count)[to] - np.eye(count)[of] for of in range(count) for to in range(count) if to != of]
    near = np.array([start, *(start + move / 10 for move in moves if (start + move / 10).min() >= 0)])
    return near[run_mixtures(near, objectives, SEARCH_SEEDS, steps, mode).mean(-1).argmin()]


def draw(scene: str, traces: dict[str, Trace], objectives: list[str]) -> Path:
    """Draw the probabilities over the run, one panel a sampler, with the 95 % intervals of the means over seeds."""
    columns = 5
    figure = Figure(figsize=(2.6 * columns, 2.3 * -(-len(traces) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(traces) // columns), columns, sharex=True, sharey=True).ravel()
    for (name, traced), panel in zip(traces.items(), panels, strict=True):
        done = np.arange(len(traced.probabilities)) / len(traced.probabilities)
        means, widths = traced.probabilities.mean(1), half_width(traced.probabilities, 1)
        for number, objective in enumerate(objectives):
            mean, width = means[:, number], widths[:, number]
            panel.plot(done, mean, color=COLOURS[number], label=objective, linewidth=1.4)
            panel.fill_between(done, mean - width, mean + width, color=COLOURS[number], alpha=0.2, linewidth=0)
        panel.set_title(name, fontsize=9)
        panel.grid(True, alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("part of the run", fontsize=9)
    figure.supylabel("probability (mean over seeds, 95 % interval)", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    path = RESULTS / "samplers" / f"{scene}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


if __name__ == "__main__":
    main()
