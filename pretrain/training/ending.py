"""How a run ends: with an exit code, and with one line from the rank that knows if it was not well."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from pretrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, RunError, UserError
from pretrain.training.watch import Watch

_PACKAGE = Path(__file__).parents[1]


class Ending:
    """Turns what a run raises into its exit code: 0 done or stopped after a save, 1 failed, 2 the user's mistake.

    Args:
        name: of the command, which its messages begin with.
    """

    def __init__(self, name: str):
        self.name = name
        self.watch: Watch | None = None
        """That of this run, once the ranks are joined."""

    def of(self, run: Callable[[], None]) -> int:
        """Run, print what goes wrong, and return the exit code.

        Once the ranks are joined, the others learn of it and end, and one alone speaks. A defect of the program is
        raised by that one, with its traceback.
        """
        try:
            run()
            return EXIT_DONE
        except UserError as error:
            return self._end("error", str(error), EXIT_USER_ERROR)
        except RunError as error:
            return self._end("failed", str(error), EXIT_FAILURE)
        except OSError as error:
            return self._end("failed", f"rank {_variable('RANK')}: {_told(error)}", EXIT_FAILURE)
        except BaseException as error:
            if is_lost_contact(error):
                who = self.watch.missing() if self.watch else ""
                if who is None:
                    return self.watch.code
                reason = f"{who or 'lost contact with another rank'} ({_reason(error)})"
                return self._end("failed", reason, EXIT_FAILURE)
            if self.watch is None or self.watch.fail(repr(error)):
                raise
            return EXIT_FAILURE
        finally:
            if self.watch is not None:
                self.watch.close()

    def tell(self, line: str) -> None:
        """Print the one line of a run that fails."""
        print(f"{self.name}: failed: {line}", file=sys.stderr, flush=True)

    def _end(self, what: str, line: str, code: int) -> int:
        """Print the line if this rank is the one to, and return the code."""
        speaks = self.watch.fail(line, code) if self.watch else _variable("LOCAL_RANK") == 0
        if speaks:
            print(f"{self.name}: {what}: {line}", file=sys.stderr, flush=True)
        return code


def _variable(name: str) -> int:
    return int(os.environ.get(name, 0))


def _told(error: OSError) -> str:
    """Return what the system says, of which file, and where in the package it was met."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    place = f" ({Path(own[-1].filename).relative_to(_PACKAGE.parent)}:{own[-1].lineno})" if own else ""
    return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{place}"


def _reason(error: BaseException) -> str:
    """Return what gloo says without where in its source, and without its guesses."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone or does not answer."""
    return isinstance(error, RuntimeError) and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))
