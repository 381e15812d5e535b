"""``medley learn-mask``: learn which spans to mask; one method a module."""

import argparse
import importlib

# name → (module with ``add_arguments(parser)`` and ``run(args)``, help line)
METHODS = {
    "supervised": ("pretrain.masking.learning.supervised", "from answers marked in their contexts"),
    "meta": ("pretrain.masking.learning.meta", "from what helps an end task"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the methods of ``medley learn-mask``."""
    subparsers = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, (module, text) in METHODS.items():
        importlib.import_module(module).add_arguments(subparsers.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> None:
    """Run the method chosen."""
    importlib.import_module(METHODS[args.method][0]).run(args)
