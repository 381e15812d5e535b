"""A table of the results of docs/kernels.md: for every op Medley, its peers, and how it stands to the fastest of them.

    python kernels/benchmarks/table.py [FILE] [--into DOCUMENT]

Prints Markdown from the last run of each op, or puts it between the two comments ``<!-- table … -->`` of a document.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE),) if folder not in sys.path]

import run  # noqa: E402  (it makes the rest importable)
from measuring import short  # noqa: E402
from records import PEAK, RESULTS, TIME, Record, last_runs, read  # noqa: E402

from pretrain.errors import EXIT_DONE, EXIT_USER_ERROR, UserError  # noqa: E402

HEADINGS = ("op", "Medley", "peers", "GEMMs alone", "time over the fastest peer's")
OURS, FLOOR, NOTHING = "medley", "its GEMM", "empty launch"
CLEARLY = 2
"""A time over a peer's from which on it is set in bold."""
_PLACE = re.compile(r"(<!-- table of [^>]*-->\n).*?(<!-- end of the table -->)", re.DOTALL)


def table(path: Path) -> str:
    """Return the Markdown of a file of results."""
    found = last_runs(read(path))
    runs = {op: found[op] for op in run.load() if op in found}
    if not runs:
        raise UserError(f"{path} holds no results of the ops, or quick ones only")
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | ---: | --- | ---: | ---: |"]
    for op, (_, records) in runs.items():
        for mode in dict.fromkeys(record.mode for record in records):
            lines.append("| " + " | ".join(_row(op, mode, [each for each in records if each.mode == mode])) + " |")
    where = dict.fromkeys(f"{each.gpu}; {each.versions}" for each, _ in runs.values())
    when = dict.fromkeys(f"{each.commit} ({each.date[:10]})" for each, _ in runs.values())
    return "\n".join([*lines, "", f"{'; '.join(where)}; commit {', '.join(when)}", ""])


def _row(op: str, mode: str, records: list[Record]) -> list[str]:
    times, peaks = ({each[:4]: each for each in records if each.metric == metric} for metric in (TIME, PEAK))
    shape = records[0].shape
    here = {each.provider: each for each in times.values() if each.shape == shape}

    def cell(provider: str) -> str:
        peak = peaks[here[provider][:4]].p50
        return f"{short(here[provider].p50)} ms, {f'{peak:.0f}' if peak >= 10 else f'{peak:.2g}'} MiB"

    peers = sorted((name for name in here if _is_peer(name)), key=lambda name: here[name].p50)
    ratios = _ratios(times.values())
    return [
        f"`{op}`" + f", {mode}" * (mode != "forward"),
        cell(OURS) if OURS in here else "",
        "; ".join(f"{name} {cell(name)}" for name in peers),
        "".join(f"{short(each.p50)} ms" for name, each in here.items() if name.startswith(FLOOR)),
        _span(ratios, ratios.get(shape)),
    ]


def _is_peer(provider: str) -> bool:
    return not provider.startswith((OURS, FLOOR, NOTHING))


def _ratios(times: Iterable[Record]) -> dict[str, float]:
    """Return for each shape our time over that of the fastest peer there."""
    ours, fastest = {}, {}
    for each in times:
        if each.provider == OURS:
            ours[each.shape] = each.p50
        elif _is_peer(each.provider):
            fastest[each.shape] = min(each.p50, fastest.get(each.shape, each.p50))
    return {shape: ours[shape] / fastest[shape] for shape in ours if shape in fastest}


def _span(ratios: dict[str, float], here: float | None) -> str:
    """Return the ratio at an op's first shape and, in brackets, its least and its largest."""
    if here is None:
        return ""
    low, high = min(ratios.values()), max(ratios.values())
    text = f"{here:.2g}" + f" ({low:.2g} to {high:.2g})" * (len(ratios) > 1)
    return f"**{text}**" if high >= CLEARLY else text


def insert(text: str, document: Path) -> None:
    """Put a table into its place in a document.

    Raises:
        UserError: if it has no such place.
    """
    before = document.read_text(encoding="utf-8")
    if len(_PLACE.findall(before)) != 1:
        raise UserError(f"{document} has no place for a table: '<!-- table of … -->' and '<!-- end of the table -->'")
    document.write_text(_PLACE.sub(lambda match: match[1] + text + match[2], before), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS / "cpu.csv", metavar="FILE", help="of results")
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="put it there instead of printing it")
    args = parser.parse_args(argv)
    try:
        if args.into:
            insert(table(args.file), args.into)
        else:
            print(table(args.file), end="")
    except (UserError, OSError) as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
