"""What the commands of the studies share: names on the command line, settings as options, exit codes."""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TypeVar

from pretrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, RunError, UserError, unknown

S = TypeVar("S")


def exit_code(study: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> int:
    """Do a study; return the exit code, with one line for what went wrong."""
    try:
        study(args)
    except UserError as error:
        say(f"study: error: {error}")
        return EXIT_USER_ERROR
    except RunError as error:
        say(f"study: failed: {error}")
        return EXIT_FAILURE
    return EXIT_DONE


def names(given: str, known: Iterable[str], kind: str, option: str) -> list[str]:
    """Return the names in a list with commas.

    Raises:
        UserError: naming ``option``, for one that is not ``known``.
    """
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise unknown(kind, name, known, option)
    return wanted


def add_settings(parser: argparse.ArgumentParser, default: object) -> None:
    """Declare an option for each field of a dataclass of settings."""
    for field in fields(default):
        option, value = f"--{field.name.replace('_', '-')}", getattr(default, field.name)
        parser.add_argument(option, type=type(value), metavar="N", help=f"default: {value}")


def settings_of(args: argparse.Namespace, default: S) -> S:
    """Return the settings with what was given on the command line in place."""
    given = {field.name: getattr(args, field.name, None) for field in fields(default)}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def say(line: str) -> None:
    """Tell a person how far it is."""
    print(line, file=sys.stderr, flush=True)
