"""The watch over the ranks: ends a run that cannot go on, within a bounded time, with one line that says why.

Every rank tells how it is (:mod:`pretrain.training.beats`) on a board that rank 0 keeps. Rank 0 judges all beats, the
others whether rank 0 still answers. Whoever knows why the run ends, since it hangs, fails or misses another rank,
leaves a *verdict* on the board: the first one is printed, by the rank that left it, and ends all ranks.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from pretrain.errors import EXIT_FAILURE
from pretrain.training.beats import PATIENCE, Beat, Progress, Pulse, judge, laggard, ranks
from pretrain.training.notice_board import NoticeBoard, bounded

LIMIT_SECONDS = {"cpu": 35, "cuda": 600}
"""Default of ``--timeout`` by device: on a GPU the first compilation of kernels counts."""
STACKS = "stacks"
"""Folder in the run's with every rank's stacks, when it was ended because one hung."""
_FOR_EVER_SECONDS = 7 * 24 * 3600.0
_TICKS = 40  # in the limit
_LONGEST_TICK_SECONDS = 2.0
_GRACE_TICKS, _LEAST_GRACE_SECONDS = 3, 2.0


def collective_timeout(limit_seconds: float, device_type: str) -> float:
    """Return how long collectives may wait, for what the watch does not see: a rank that computes for ever.

    On a GPU it sees less, since collectives return before they are done.
    """
    return limit_seconds * (PATIENCE if device_type == "cpu" else 2) or _FOR_EVER_SECONDS


class Watch:
    """Watches the thread that makes it, and the other ranks; made by all of them once they are joined.

    Args:
        limit_seconds: how long a rank may stand still, or be silent, while others need it; 0: for ever.
        tell: prints the line that ends the run.
        folder: the run's, for the stacks of all ranks when one of them hangs.
    """

    def __init__(self, limit_seconds: float, tell: Callable[[str], None], folder: Path | None = None):
        self.progress = Progress()
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._limit, self._tell, self._folder = limit_seconds or float("inf"), tell, folder
        self._tick = min(_LONGEST_TICK_SECONDS, self._limit / _TICKS)
        self._grace = max(_GRACE_TICKS * self._tick, _LEAST_GRACE_SECONDS)
        self._pulse = Pulse(self._limit, self.progress)
        self._beat = self._pulse.beat()
        self._contact = self._looked = time.monotonic()  # when rank 0, and this rank, last gave a sign of life
        self._noted = -float("inf")
        self._verdict: dict | None = None
        self._missing = False  # the main thread is finding out who is
        self._closing = threading.Event()
        self._board: NoticeBoard | None = None
        if self.world_size > 1:
            name = [os.urandom(8).hex()]  # a launcher's store may still hold the verdict of an earlier start
            torch.distributed.broadcast_object_list(name, 0)
            self._board = NoticeBoard(name[0])
            threading.Thread(target=self._exchange, args=(NoticeBoard(name[0]),), daemon=True).start()
        threading.Thread(target=self._guard, daemon=True).start()

    def fail(self, line: str, code: int = EXIT_FAILURE) -> bool:
        """Leave a verdict; return whether it is the first, so that this rank is the one to print it.

        The other ranks end as well. On rank 0 it returns when they know of it.
        """
        first = self._leave(line, code, stacks=False)
        self._wait_for_others()
        return first

    def missing(self) -> str | None:
        """Return which ranks have gone, "" if none has, after a call to others has failed; None if another rank has
        told why the run ends."""
        self._missing = True
        if self._board is None:
            return ""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        before = bounded(self._grace, self._board.beats, others)
        self._closing.wait(self._grace)
        after = bounded(self._grace, self._board.beats, others)
        if self._verdict is not None:
            return None
        if before is None or after is None:
            return "rank 0 is gone" if self._speaks_without_board() else None
        gone = [rank for rank in others if after.get(rank) == before.get(rank)]
        return f"{ranks(gone)} gone" if gone else ""

    @property
    def code(self) -> int:
        """The exit code that the verdict of another rank has given all of them."""
        return self._verdict["code"] if self._verdict else EXIT_FAILURE

    def close(self) -> None:
        """End the watch: the run is over for this rank, and none of the others is to miss its beats."""
        self._closing.set()
        self._beat = replace(self._beat, number=self._beat.number + 1, ended=True)
        if self._board is not None:
            bounded(self._grace, self._board.put, self.rank, self._beat)

    def _guard(self) -> None:
        """Beat; end this process when there is a verdict, when rank 0 does not answer, or, alone, when it hangs."""
        while not self._closing.wait(self._tick):
            now = time.monotonic()
            if now - self._looked > self._limit / 2:  # this process, or the machine, stood still
                self._pulse.restart()
                self._contact = now
            self._looked, beat = now, self._pulse.beat()
            if not self._closing.is_set():
                self._beat = beat
            verdict = self._verdict
            if verdict is None and not self._missing:
                verdict = self._own_verdict(beat, now - self._contact)
            if verdict is not None:
                self._verdict = verdict
                self._end(verdict)

    def _own_verdict(self, beat: Beat, silent_seconds: float) -> dict | None:
        """Return why this rank has to end without having been told, having printed it; None if it has not."""
        alone = self._board is None
        line = judge({0: beat}, {0: 0.0}, self._limit) if alone else None
        if not alone and self.rank > 0 and silent_seconds > self._limit:
            line = f"rank 0 is silent for {silent_seconds:.0f} s: stopped, or cut off from rank {self.rank}"
        if line is None:
            return None
        if alone or self._speaks_without_board():
            bounded(self._grace, self._tell, line)
        return {"code": EXIT_FAILURE, "stacks": True}

    def _exchange(self, board: NoticeBoard) -> None:
        """Tell this rank's beats, learn of the others' and of a verdict; on rank 0, judge them."""
        others = range(self.world_size) if self.rank == 0 else (0,)
        came = {rank: (Beat.before_the_first(), self._contact) for rank in others}  # last beat, and when it came
        passed = time.monotonic()
        while not self._closing.wait(self._tick) and self._verdict is None:
            try:
                board.put(self.rank, self._beat)
                beats, verdict = board.beats(others), board.verdict()
                if verdict is not None and self.rank > 0:
                    board.see()
            except RuntimeError:  # rank 0 has ended; the guard gives this rank the time to end as well
                continue
            now = time.monotonic()  # only here: all ranks may have been stopped while this one waited for rank 0
            stood_still, passed = now - passed > self._limit / 2, now
            for rank in others:
                beat = beats.get(rank, came[rank][0])
                if stood_still or beat.number != came[rank][0].number:
                    came[rank] = beat, now
            self._contact = came[0][1]
            if verdict is not None:
                self._verdict = verdict
            elif self.rank == 0:
                self._judge(
                    {rank: beat for rank, (beat, _) in came.items()}, {each: now - at for each, (_, at) in came.items()}
                )

    def _judge(self, beats: dict[int, Beat], silent: dict[int, float]) -> None:
        """End the run if a rank hangs or is silent; say for which rank the others wait, if it is long."""
        if line := judge(beats, silent, self._limit):
            if self._leave(line, EXIT_FAILURE, stacks=True):
                told = line + (f"; stacks of all ranks: {self._folder / STACKS}" if self._folder else "")
                bounded(self._grace, self._tell, told)
        elif (line := laggard(beats, self._limit)) and time.monotonic() - self._noted > self._limit:
            self._noted = time.monotonic()
            bounded(self._grace, partial(print, f"note: {line}", flush=True))

    def _leave(self, line: str, code: int, stacks: bool) -> bool:
        """Leave a verdict; return whether it is the first."""
        if self._board is None:
            return True
        mine = {"by": self.rank, "line": line, "code": code, "stacks": stacks}
        standing = bounded(self._grace, self._board.offer, mine)
        return standing in (mine, None)

    def _speaks_without_board(self) -> bool:
        """Whether this rank tells what all ranks know, where they cannot agree on who does: one of each node."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0 or self.rank == 1

    def _wait_for_others(self) -> None:
        """On rank 0, with which the board ends: wait until the others know of the verdict, but not for those gone."""
        deadline = time.monotonic() + self._grace
        while self._board is not None and self.rank == 0 and time.monotonic() < deadline:
            if bounded(self._grace, self._board.see, 0) in (None, self.world_size - 1):
                return
            time.sleep(self._tick / 4)

    def _end(self, verdict: dict) -> None:
        """Write down the stacks if they tell something, and end the process, unless the main thread does by itself.

        Nothing here is waited for without a bound: what hangs may be the disk, or whoever reads the output.
        """
        if verdict["stacks"] and self._folder is not None:
            bounded(self._grace, self._write_stacks, self._folder / STACKS)
        self._wait_for_others()
        if not self._closing.wait(self._grace):
            for stream in (sys.stdout, sys.stderr):
                bounded(self._grace, stream.flush)
            os._exit(verdict["code"])

    def _write_stacks(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        with open(folder / f"rank-{self.rank:05d}.txt", "w") as file:
            faulthandler.dump_traceback(file)
