"""``medley bench``: the microbenchmarks of the fused ops, which live in the checkout and not in the package."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pretrain.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks" / "run.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``kernels/benchmarks/run.py``.

    Raises:
        UserError: if there is no checkout around the package.
    """
    _script().add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Run the benchmarks."""
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
