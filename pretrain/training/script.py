"""How the process of a rank that a launcher has started ends."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pretrain.errors import EXIT_USER_ERROR

MISTAKE = "MEDLEY_MISTAKE"
"""Environment variable: a file that a rank makes when it ends with the user's mistake, for a scheduler that may see the
exit code of another rank only."""
_LINGER_SECONDS = 10.0


def leave(main: Callable[[], int]) -> NoReturn:
    """Do what a script does, and end its process with the exit code that ``main`` returns."""
    try:
        code = main()
    except SystemExit as stop:  # --help, or an option that there is not
        code = stop.code if isinstance(stop.code, int) else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_USER_ERROR:
        if mark := os.environ.get(MISTAKE):
            Path(mark).touch()
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(_LINGER_SECONDS)  # launchers kill the others with the first that ends, and rank 0 is to tell
    os._exit(code or 0)  # on a busy machine a thread of gloo may outlive the interpreter, which then aborts
