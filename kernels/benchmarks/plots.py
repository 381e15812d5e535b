"""Figures of a run: for each op one panel for every number that its shapes vary, time over that number."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from cases import EMPTY_LAUNCH, FORWARD, TRAINING
from losses import GEMMS
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from records import TIME, Record, Run

AXES = {
    "V": "vocabulary (entries)",
    "tokens": "tokens",
    "rate": "rate",
    "d": "width",
    "p": "width of the outputs",
    "length": "length of a sample (tokens)",
}
_LINEAR = {"rate"}
# One colour for each implementation, the same in all figures; variants of one share it and differ in their dashes.
COLOURS = {
    "medley": "#d1495b",
    "torch.compile": "#2a9d8f",
    "torch": "#1d3f72",
    "F.linear_cross_entropy": "#a06cd5",
    "Liger": "#edae49",
    "cut-cross-entropy": "#5f7a3a",
    "transformers": "#b5651d",
    "Opacus": "#edae49",
    GEMMS: "#444444",
    "its GEMM alone": "#444444",
    EMPTY_LAUNCH.name: "#999999",
}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^v"


def draw(records: Iterable[Record], folder: Path, run: Run) -> Iterator[Path]:
    """Draw what a run measured at two or more values of a number; yield the PNG files."""
    of_op: dict[str, list[Record]] = {}
    for record in records:
        if record.metric == TIME:
            of_op.setdefault(record.op, []).append(record)
    for op, times in of_op.items():
        modes = {record.mode for record in times}
        mode = times[0].mode
        if modes & {FORWARD, TRAINING} == {mode} and len(modes) > 1:  # the others are held against it
            mode = "all modes"
            times = [record._replace(provider=f"{record.provider}, {record.mode}") for record in times]
        else:
            mode = TRAINING if TRAINING in modes else mode
            times = [record for record in times if record.mode == mode]
        panels = list(_panels(times))
        if panels:
            path = folder / f"{op}.png"
            made = f"{run.date}, commit {run.commit or 'unknown'}, {run.versions}"
            _figure(panels, f"{op}, {mode}, {times[0].dtype}\n{run.gpu}", made, path)
            yield path


def _panels(times: list[Record]) -> Iterator[tuple[str, str, dict, dict[str, list[Record]]]]:
    """Yield each number that varies, its label, the others at which it does, and each provider's times along it."""
    shapes = [_numbers(record.shape) for record in times]
    base = shapes[0]  # every op begins with it
    for axis in AXES:
        square = axis == "d" and "p" in base  # those layers vary both at once
        fixed = {name: value for name, value in base.items() if name != axis and not (square and name == "p")}
        lines: dict[str, list[Record]] = {}
        for record, shape in zip(times, shapes, strict=True):
            fits = all(shape[name] == value for name, value in fixed.items())
            if axis in shape and fits and (not square or shape["p"] == shape["d"]):
                lines.setdefault(record.provider, []).append(record)
        if len({record.shape for line in lines.values() for record in line}) > 1:
            yield axis, "width (d and p vary together)" if square else AXES[axis], fixed, lines


def _numbers(shape: str) -> dict[str, str]:
    return dict(word.split("=") for word in shape.split())


def _figure(panels: list, title: str, made: str, path: Path) -> None:
    figure = Figure(figsize=(2.6 + 3 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    styles: dict[str, dict] = {}
    for (axis, label, fixed, lines), panel in zip(panels, axes[0], strict=True):
        ticks = set()
        for provider, records in lines.items():
            style = styles.setdefault(provider, _style(provider, styles))
            points = sorted((float(_numbers(record.shape)[axis]), record) for record in records)
            places = [place for place, _ in points]
            ticks.update(places)
            panel.plot(places, [record.p50 for _, record in points], label=provider, **style)
            low, high = ([getattr(record, name) for _, record in points] for name in ("p20", "p80"))
            panel.fill_between(places, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set_yscale("log")
        if axis not in _LINEAR:
            panel.set_xscale("log")
        panel.set_xticks(sorted(ticks))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="x", rotation=30)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.set_xlabel(label)
        panel.set_title(" ".join(f"{name}={value}" for name, value in fixed.items()), fontsize=8)
        panel.grid(True, which="major", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("milliseconds (median; band p20 to p80)")
    handles = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
    figure.legend(handles=list(handles.values()), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.supxlabel(made, fontsize=5, x=0.01, ha="left", color="#666666")
    figure.savefig(path, dpi=110)


def _style(provider: str, taken: dict[str, dict]) -> dict:
    family = next((name for name in COLOURS if provider.startswith(name)), provider)
    colour = COLOURS.get(family, "#000000")
    variant = sum(style["color"] == colour for style in taken.values())
    return {
        "color": colour,
        "linestyle": _DASHES[variant % len(_DASHES)],
        "marker": _MARKERS[variant % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 2 if provider == "medley" else 1.3,
        "zorder": 3 if provider == "medley" else 2,
    }
