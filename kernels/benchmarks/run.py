"""Microbenchmarks of the fused ops against their floors and their peers, also as ``medley bench``.

    python kernels/benchmarks/run.py [op ...] [--quick] [--plots FOLDER]

Needs a checkout and no installation. On a GPU the shapes are those that count; on a CPU the plain-torch twins run at
smaller sizes.
"""

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in map(str, (HERE, HERE.parent, HERE.parents[1])) if folder not in sys.path]

from pretrain.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError, unknown  # noqa: E402

SECONDS, QUICK_SECONDS = 0.1, 0.03  # of repetitions, each time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help="what to measure (default: all; --list names them)")
    add("--list", action="store_true", help="list the ops and the functions that each measures")
    add("--quick", action="store_true", help="one shape an op, few repetitions")
    add("--full", action="store_true", help="on a CPU, the same sizes as on a GPU (slow, many GiB)")
    add("--providers", nargs="+", default=[], metavar="WORD", help="only those whose name has one of these words")
    add("--csv", type=Path, metavar="FILE", help="append results there (default: kernels/benchmarks/results/)")
    add("--plots", type=Path, metavar="FOLDER", help="draw a figure for every op measured at several shapes")


def run(args: argparse.Namespace) -> None:
    """Measure and print; exit with code 1 if one of our own ops failed."""
    benchmarks = load()
    if args.list:
        return list_ops(benchmarks.values())
    for name in args.ops:
        if name not in benchmarks:
            raise unknown("op", name, benchmarks)

    import floors  # what takes a second to import is not needed for --help
    import goals
    import records
    import torch
    from cases import Scale
    from measuring import Meter
    from timing import Clock

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    file = args.csv or records.default_file(device)
    try:
        records.check_file(file)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device == "cpu":
        torch.set_num_threads(1)  # or CPU time would count threads that wait for each other
    start = time.monotonic()
    clock = Clock(device, QUICK_SECONDS if args.quick else SECONDS)
    scale = Scale(full=args.full or device == "cuda", quick=args.quick)
    machine = records.machine(device)
    print(f"{machine.gpu}; {machine.versions}")
    if device == "cpu":
        sizes = "full sizes" if scale.full else f"{scale.tokens:,} tokens and the like (--full for those that count)"
        print(f"no GPU: the plain-torch twins in fp32, CPU time of one thread, {sizes}")
    measured = floors.measure(clock, dtype)
    print(measured)
    meter = Meter(clock, measured, scale, args.providers)
    results = []
    for benchmark in benchmarks.values():
        if benchmark.name in args.ops or not (args.ops or (benchmark.optional and device == "cpu")):
            of_op = list(meter.records(benchmark))
            records.append(file, of_op, machine)
            results += of_op
    print(f"\n{len(results)} results added to {file} after {time.monotonic() - start:.0f} s")
    if args.plots:
        draw(results, args.plots, machine.gpu)
    print("\nGoals")
    print(*goals.judge(results, device), sep="\n")
    if meter.failures:
        print(f"failed: {', '.join(dict.fromkeys(meter.failures))}", file=sys.stderr)
        raise SystemExit(EXIT_FAILURE)


def load() -> dict:
    """Return all benchmarks by name, in the order in which they run."""
    import corruption
    import losses
    import norms

    return {each.name: each for each in chain(corruption.BENCHMARKS, losses.BENCHMARKS, norms.BENCHMARKS)}


def list_ops(benchmarks) -> None:
    for benchmark in benchmarks:
        print(f"{benchmark.name:27}{benchmark.about}")
        print(f"{'':29}{', '.join(benchmark.functions)}")


def draw(results: list, folder: Path, device: str) -> None:
    """Draw the figures, or say why not."""
    try:
        import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return
    for path in plots.draw(results, folder, device):
        print(f"drew {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code (2 for the user's mistakes, told in one line)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
