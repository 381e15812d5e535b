"""``medley bench``: the microbenchmarks of the fused ops, which live in the checkout and not in the package."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pretrain.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks" / "run.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command, which are those of ``kernels/benchmarks/run.py``."""
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help="what to measure (default: all; --list names them)")
    add("--list", action="store_true", help="list the ops and the functions that each measures")
    add("--quick", action="store_true", help="one shape an op, few repetitions")
    add("--full", action="store_true", help="on a CPU, the same sizes as on a GPU (slow, many GiB)")
    add("--providers", metavar="WORD,...", help="only those whose name has one of these words")
    add("--csv", metavar="FILE", help="append results there (default: kernels/benchmarks/results/<device>.csv)")
    add("--plots", metavar="FOLDER", help="draw a figure for every op measured at several shapes")
    add("--redraw", action="store_true", help="measure nothing: draw the figures of the last results in the file")


def run(args: argparse.Namespace) -> None:
    """Run the benchmarks.

    Raises:
        UserError: if there is no checkout around the package.
    """
    _script().run(args)


def _script() -> ModuleType:
    name = "medley_bench"
    if name not in sys.modules:
        if not SCRIPT.is_file():
            raise UserError(f"no benchmarks at {SCRIPT}; clone the repository and install it with pip install -e .")
        spec = importlib.util.spec_from_file_location(name, SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]
