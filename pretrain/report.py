"""``medley report``: what a run came to, on one screen."""

import argparse
import json
import statistics
from pathlib import Path

from pretrain.errors import UserError
from pretrain.report_picture import draw_run
from pretrain.training.log import HELDOUT_START, read_metrics


def report(run: Path) -> str:
    """Return the table of a run: losses, speed, end-task scores if there are any, and where the model is.

    Raises:
        UserError: if the folder is not that of a run.
    """
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run}: no metrics.jsonl with a step in it; is this a run folder?")
    parts = [_losses(run, records), _speed(records)]
    scores = sorted([*run.glob("evaluation-*.json"), *(run / "export").glob("evaluation-*.json")])
    trained = [path for path in scores if not path.stem.endswith("-untrained")]
    parts += [_scores(path) for path in trained]
    if (run / "export" / "config.json").is_file():
        parts.append(f"model: {run / 'export'}")
    return "\n\n".join(parts)


def _losses(run: Path, records: list[dict]) -> str:
    """Losses of each objective at start and end: on held-out text where measured, else on the training batches."""
    start_file = run / HELDOUT_START
    heldout = [record["heldout"] for record in records if "heldout" in record]
    if start_file.is_file() and heldout:
        title, start, end = "held-out loss", json.loads(start_file.read_text()), heldout[-1]
    else:
        title, start, end = "training loss", {}, {}
        for record in records:
            start = {**record["losses"], **start}
            end = {**end, **record["losses"]}
    rows = [(name, start[name], end[name]) for name in start if name in end]
    lines = [f"{title:<16}{'start':>10}{'end':>10}{'change':>10}"]
    for name, first, last in rows:
        change = f"{(last - first) / abs(first):+10.1%}" if first and last is not None else f"{'':>10}"
        lines.append(f"{name:<16}{_number(first)}{_number(last)}{change}")
    return "\n".join(lines)


def _speed(records: list[dict]) -> str:
    speed = statistics.median(record["tokens_per_second"] for record in records)
    last = records[-1]
    return f"{last['step']:,} steps, {last['tokens_seen']:,} tokens, {speed:,.0f} tokens/s (median step)"


def _scores(path: Path) -> str:
    """Scores on one end task against the untrained model, if that was evaluated, and the baseline."""
    result = json.loads(path.read_text())
    control_file = path.with_name(f"{path.stem}-untrained.json")
    columns = [("this model", result)]
    if control_file.is_file():
        columns.append(("untrained", json.loads(control_file.read_text())))
    title = f"{result['task']}, test"
    lines = [f"{title:<16}" + "".join(f"{name:>18}" for name, _ in columns) + f"{result['baseline']['name']:>12}"]
    for name, floor in result["baseline"]["values"].items():
        cells = "".join(f"{_mean_sd(column, name):>18}" for _, column in columns)
        lines.append(f"{name:<16}{cells}{floor:>12.4f}")
    return "\n".join(lines)


def _mean_sd(result: dict, name: str) -> str:
    mean, sd = result["mean"]["test"][name], result["sd"]["test"][name]
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def _number(value: float | None) -> str:
    return f"{'not finite' if value is None else f'{value:.4f}':>10}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley report``."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="PNG to draw (default: RUN/report.png)")


def run(args: argparse.Namespace) -> None:
    """Print the report and draw its picture."""
    print(report(args.run))
    path = args.picture or args.run / "report.png"
    try:
        print(f"picture: {draw_run(read_metrics(args.run), path)}")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another file with --picture") from None
