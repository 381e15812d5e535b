"""Microbenchmarks of the fused ops against their floors and their peers, also as ``medley bench``.

    python kernels/benchmarks/run.py [op ...] [--quick] [--plots FOLDER]

Needs a checkout and no installation. On a GPU the shapes are those that count; on a CPU the plain-torch twins run at
smaller sizes.
"""

import argparse
import os
import sys
import time
from itertools import chain
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in map(str, (HERE, HERE.parent, HERE.parents[1])) if folder not in sys.path]

from pretrain.bench import add_arguments  # noqa: E402
from pretrain.errors import EXIT_FAILURE, EXIT_USER_ERROR, UserError, unknown  # noqa: E402

SECONDS, QUICK_SECONDS = 0.1, 0.03  # of repetitions, each time
EXIT_INTERRUPTED = 130


def run(args: argparse.Namespace) -> None:
    """Measure and print; exit with code 1 if one of our own ops failed, with 130 on Ctrl-C.

    Raises:
        UserError: before anything is measured, for names that are unknown and files that cannot be written.
    """
    benchmarks = load()
    if args.list:
        return list_ops(benchmarks.values())
    for name in args.ops:
        if name not in benchmarks:
            raise unknown("op", name, benchmarks)

    import records  # what takes a second to import is not needed for --help
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [
        benchmark
        for benchmark in benchmarks.values()
        if benchmark.name in args.ops or not (args.ops or (benchmark.optional and device == "cpu"))
    ]
    words = words_of(args.providers, chosen, device)
    file = records.default_file(device) if args.csv is None else path_of("--csv", args.csv)
    folder = plots_folder(args)
    if args.redraw:
        return redraw(records.read(file), folder, args.ops)
    records.start(file)
    measure(args, chosen, words, device, file, folder)


def measure(
    args: argparse.Namespace, benchmarks: list, words: list[str], device: str, file: Path, folder: Path | None
) -> None:
    """Measure the benchmarks' providers, add the results to the file one by one, and draw and judge them."""
    import floors
    import goals
    import records
    import torch
    from cases import Scale
    from measuring import Meter
    from timing import Clock

    if device == "cpu":
        torch.set_num_threads(1)  # or CPU time would count threads that wait for each other
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    start = time.monotonic()
    clock = Clock(device, QUICK_SECONDS if args.quick else SECONDS)
    scale = Scale(full=args.full or device == "cuda", quick=args.quick)
    this_run = records.this_run(device, args.quick)
    print(f"{this_run.gpu}; {this_run.versions}")
    if device == "cpu":
        sizes = "full sizes" if scale.full else f"{scale.tokens:,} tokens and the like (--full for those that count)"
        print(f"no GPU: the plain-torch twins in fp32, CPU time of one thread, {sizes}")
    results = []
    try:
        measured = floors.measure(clock, dtype)
        print(measured)
        meter = Meter(clock, measured, scale, words)
        for benchmark in benchmarks:
            for record in meter.records(benchmark):
                records.append(file, [record], this_run)
                results.append(record)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {len(results)} results are kept in {file}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    print(f"\n{len(results)} results added to {file} after {time.monotonic() - start:.0f} s")
    if folder:
        draw([(this_run, results)], folder)
    if device == "cuda":
        print("\nGoals", *goals.judge(results), sep="\n")
    if meter.failures:
        print(f"failed: {', '.join(dict.fromkeys(meter.failures))}", file=sys.stderr)
        raise SystemExit(EXIT_FAILURE)


def words_of(providers: str | None, benchmarks: list, device: str) -> list[str]:
    """Return the words of ``--providers``, each of which is in the name of a provider that runs here."""
    if providers is None:
        return []
    all_providers = [provider for benchmark in benchmarks for provider in benchmark.providers]
    names = {provider.name for provider in all_providers if device == "cuda" or not provider.gpu_only}
    words = [word.strip() for word in providers.split(",")]
    for word in words:
        if not word or not any(word.lower() in name.lower() for name in names):
            raise unknown("provider", word, names)
    return words


def path_of(option: str, name: str) -> Path:
    if not name:
        raise UserError(f"{option}: the name is empty")
    return Path(name)


def plots_folder(args: argparse.Namespace) -> Path | None:
    """Return the folder of the figures, which is made, or None if none are wanted."""
    if args.plots is None:
        if args.redraw:
            raise UserError("--redraw draws into a folder: add --plots FOLDER")
        return None
    if args.quick:
        raise UserError("--plots draws what varies with the shape, and --quick measures one shape an op: take one only")
    folder = path_of("--plots", args.plots)
    try:
        import plots  # noqa: F401  (whether it can be)

        folder.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise UserError(f"--plots: {error}") from None
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot draw into {folder}: it is no folder") from None
    except OSError as error:
        raise UserError(f"cannot draw into {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot draw into {folder}: it is read-only")
    return folder


def redraw(rows: list, folder: Path, ops: list[str]) -> None:
    """Draw the last run of each op, or of the given ones."""
    from records import last_runs

    draw([last for op, last in last_runs(rows).items() if op in ops or not ops], folder)


def draw(runs: list[tuple], folder: Path) -> None:
    """Draw runs, each with its records, and name the figures."""
    import plots

    drawn = [path for run, results in runs for path in plots.draw(results, folder, run)]
    for path in drawn:
        print(f"drew {path}")
    if not drawn:
        print("drew nothing: no op was measured at several shapes")


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
        print(f"{Path(__file__).name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
