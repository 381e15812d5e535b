"""``medley launch``: starts the ranks of one machine, passes signals on to all, and starts them anew when they fail.

The ``deepspeed`` launcher dies of a Ctrl-C that its ranks survive, tells them one after another of a SIGTERM, and
starts nothing again; this one waits until the ranks have saved, tells all at once, and has a run that failed go on.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from pretrain.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, UserError
from pretrain.training.start import RESTART, free_port
from pretrain.training.stop import SIGNALS

_ROOT = Path(__file__).parents[1]
TRAIN = _ROOT / "launch" / "train.py"
GRACE_SECONDS = 10.0
"""For which the other ranks may end by themselves after one has failed."""
_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``medley launch``."""
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="processes (default: the GPUs there are, without GPUs one)")
    add("--restarts", type=int, default=0, metavar="N", help="times that failed ranks are started again (default: 0)")
    add("--script", type=Path, default=TRAIN, metavar="FILE", help="what each rank runs (default: launch/train.py)")
    add("arguments", nargs="*", metavar="-- ARGUMENT …", help="the script's own arguments, after --")


def run(args: argparse.Namespace) -> None:
    """Run the ranks until they are done.

    Raises:
        UserError: if the options are wrong.
        SystemExit: with the ranks' exit code if it is not 0.
    """
    ranks = torch.cuda.device_count() or 1 if args.ranks is None else args.ranks
    if ranks < 1:
        raise UserError(f"--ranks: must be at least 1, not {ranks}")
    if args.restarts < 0:
        raise UserError(f"--restarts: must be at least 0, not {args.restarts}")
    if not args.script.is_file():
        raise UserError(f"--script: no such file: {args.script}")
    if code := Launcher([sys.executable, "-u", str(args.script), *args.arguments], ranks, args.restarts).run():
        raise SystemExit(code)


class Launcher:
    """The ranks of one machine.

    Args:
        command: what each rank runs.
        ranks: how many there are.
        restarts: how often all of them are started again after one has failed.
    """

    def __init__(self, command: list[str], ranks: int, restarts: int = 0):
        self.command, self.ranks, self.restarts = command, ranks, restarts
        self.processes: list[subprocess.Popen] = []
        self.stopping: int | None = None
        """The signal that asked for it."""

    def run(self) -> int:
        """Start the ranks, again where they fail, and return the exit code: 0 done or stopped, 1 failed, 2 the user's
        mistake, which is not tried again."""
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        try:
            for start in range(self.restarts + 1):
                code, reason = self._run_once(start)
                if code in (EXIT_DONE, EXIT_USER_ERROR) or self.stopping is not None or start == self.restarts:
                    return code
                _say(f"{reason}; starting again ({start + 1} of {self.restarts})")
            return EXIT_FAILURE
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_once(self, start: int) -> tuple[int, str]:
        """Run all ranks, ``start`` times after the first; return the exit code, and which rank failed and how."""
        port = free_port()
        self.processes = []
        try:
            for rank in range(self.ranks):
                self.processes.append(self._start(rank, port, start))
            if self.stopping is not None:  # it came between two starts, or before all ranks were there
                self._pass_on(self.stopping, None)
            failed = None
            while failed is None and any(process.poll() is None for process in self.processes):
                failed = next((rank for rank, process in enumerate(self.processes) if process.poll()), None)
                time.sleep(_POLL_SECONDS)
            failed = next((rank for rank, process in enumerate(self.processes) if process.poll()), failed)
            if failed is None:
                return EXIT_DONE, ""
            mistaken = self.processes[failed].poll() == EXIT_USER_ERROR  # it has told; the others wait to be ended
            deadline = time.monotonic() + (0.0 if mistaken else GRACE_SECONDS)
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            return self._outcome(failed)
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                process.wait()

    def _outcome(self, failed: int) -> tuple[int, str]:
        """Return the exit code of ranks of which one has failed, and the one to blame: one that was killed, if any."""
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        if EXIT_USER_ERROR in codes.values():
            return EXIT_USER_ERROR, ""
        failed = next((rank for rank, code in codes.items() if code is not None and code < 0), failed)
        code = codes[failed]
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        return EXIT_FAILURE, f"rank {failed} {how}"

    def _start(self, rank: int, port: int, start: int) -> subprocess.Popen:
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            RESTART: start,
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        # In a session of their own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
        return subprocess.Popen(self.command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)

    def _pass_on(self, number: int, frame) -> None:
        self.stopping = number
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _end_with_parent() -> None:
    """Have the system send SIGTERM, on which a rank saves and ends, when the launcher is gone. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
