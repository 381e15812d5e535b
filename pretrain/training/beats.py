"""What a rank tells of itself while it runs, and what all ranks' beats say together: who hangs, and where."""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = Path(__file__).parents[1]
_WAITING = ("/torch/distributed/", "/deepspeed/")
"""Where a thread that stands still waits for other ranks."""
PATIENCE = 10
"""How many limits a rank may compute without a call of the engine."""
_KNOWN_STEPS = 3
_COMPUTING = 0.05
"""Part of a core that tells a thread that computes from one that waits."""


class Progress:
    """How far a rank has come: written by the thread that trains, read by the one that watches."""

    def __init__(self):
        self.calls = self.steps = 0
        self.at_length = False
        self.since = time.monotonic()
        self.longest_seconds = 0.0
        """Between two calls of the engine, but for what takes long."""

    def call(self) -> None:
        """Note a call of the engine, which all ranks make in the same order."""
        now = time.monotonic()
        if self.steps > 0 and not self.at_length:
            self.longest_seconds = max(self.longest_seconds, now - self.since)
        self.calls, self.since = self.calls + 1, now

    def begin_step(self) -> None:
        """Note that a step begins; what took long is done."""
        self.call()
        self.at_length = False

    def end_step(self) -> None:
        """Note that a step is done."""
        self.call()
        self.steps += 1

    def expect_long(self) -> None:
        """Note that what follows, until the next step, may take long: a checkpoint, or scoring dev."""
        self.call()
        self.at_length = True

    def standstill_seconds(self, limit_seconds: float) -> float:
        """Return how long a rank may stand still: ten times the limit where a slow disk has a checkpoint to take."""
        return PATIENCE * limit_seconds if self.at_length else limit_seconds

    def patience_seconds(self, limit_seconds: float) -> float:
        """Return how long a rank that computes may take until its next call of the engine.

        Ten times the limit, for a first compilation, a large checkpoint or dev split; once some steps are known, ten
        times the longest wait so far, but the limit at least.
        """
        if self.at_length or self.steps < _KNOWN_STEPS:
            return PATIENCE * limit_seconds
        return min(PATIENCE * limit_seconds, max(limit_seconds, PATIENCE * self.longest_seconds))


@dataclass(frozen=True)
class Beat:
    """The state of a rank's training thread."""

    number: int
    calls: int
    """Of the engine, so far."""
    place: str
    waiting: bool
    """For other ranks."""
    still_seconds: float
    """For which it has neither moved nor computed."""
    call_seconds: float
    """Since its last call of the engine."""
    standstill_seconds: float
    """What ``still_seconds`` may be, unless it waits for others."""
    patience_seconds: float
    """What ``call_seconds`` may be."""
    ended: bool = False

    @classmethod
    def before_the_first(cls) -> "Beat":
        """Return what stands for a rank that has not been heard of yet."""
        return cls(0, 0, "before its first beat", False, 0.0, 0.0, float("inf"), float("inf"))


class Pulse:
    """Feels a thread's pulse: makes its beats, from another thread."""

    def __init__(self, limit_seconds: float, progress: Progress):
        self.limit_seconds, self.progress = limit_seconds, progress
        self._thread = threading.get_ident()  # the one that makes this
        per_thread = hasattr(time, "pthread_getcpuclockid")  # not on macOS
        self._clock = time.pthread_getcpuclockid(self._thread) if per_thread else time.CLOCK_PROCESS_CPUTIME_ID
        self._number, self._signature, self._moved = 0, None, time.monotonic()
        self._looked, self._cpu = self._moved, time.clock_gettime(self._clock)

    def beat(self) -> Beat:
        """Look at the thread now."""
        now, cpu = time.monotonic(), time.clock_gettime(self._clock)
        frames = _frames(sys._current_frames().get(self._thread))
        signature = [(id(frame.f_code), frame.f_lasti) for frame in frames]
        if signature != self._signature or cpu - self._cpu > _COMPUTING * (now - self._looked):
            self._moved = now
        self._signature, self._looked, self._cpu = signature, now, cpu
        self._number += 1
        return Beat(
            self._number,
            self.progress.calls,
            _place(frames),
            bool(frames) and any(part in frames[0].f_code.co_filename for part in _WAITING),
            now - self._moved,
            now - self.progress.since,
            self.progress.standstill_seconds(self.limit_seconds),
            self.progress.patience_seconds(self.limit_seconds),
        )

    def restart(self) -> None:
        """Count anew, after the whole process stood still."""
        self._moved = self.progress.since = time.monotonic()


def judge(beats: Mapping[int, Beat], silent: Mapping[int, float], limit_seconds: float) -> str | None:
    """Return in one line who keeps the run from going on, and where; None while it may go on.

    Args:
        beats: every rank's last.
        silent: rank → seconds since its last beat came.
    """
    going = {rank: beat for rank, beat in beats.items() if not beat.ended}
    if gone := [rank for rank in going if silent[rank] >= limit_seconds]:
        seconds = min(silent[rank] for rank in gone)
        return f"{ranks(gone)} silent for {seconds:.0f} s: stopped, or cut off; last seen {going[gone[0]].place}"
    hanging = {
        rank: beat
        for rank, beat in going.items()
        if not beat.waiting
        and (beat.still_seconds >= beat.standstill_seconds or beat.call_seconds >= beat.patience_seconds)
    }
    if hanging:
        first = min(beat.calls for beat in hanging.values())
        behind = [rank for rank, beat in hanging.items() if beat.calls == first]
        beat = hanging[behind[0]]
        return f"{ranks(behind)} hanging for {beat.call_seconds:.0f} s {beat.place}"
    if going and all(beat.waiting and beat.still_seconds >= limit_seconds for beat in going.values()):
        places = "; ".join(f"rank {rank} {beat.place}" for rank, beat in list(going.items())[:2])
        return f"the ranks wait for each other: {places}"
    return None


def laggard(beats: Mapping[int, Beat], limit_seconds: float) -> str | None:
    """Return in one line for whom others wait, where it has been long and may go on; None if there is nobody."""
    waits = [beat.still_seconds for beat in beats.values() if beat.waiting and not beat.ended]
    busy = {rank: beat for rank, beat in beats.items() if not (beat.waiting or beat.ended)}
    if not waits or not busy or max(waits) < limit_seconds / 2:
        return None
    slowest = min(busy, key=lambda rank: busy[rank].calls)
    return f"others have waited {max(waits):.0f} s for rank {slowest}, which is {busy[slowest].place}"


def ranks(numbers: list[int]) -> str:
    """Return "rank 3 is" or "ranks 3, 5 are", of many the first ones."""
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    return f"rank {shown} is" if len(numbers) == 1 else f"ranks {shown} are"


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Return a thread's frames, the innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _place(frames: list[FrameType]) -> str:
    """Say where a thread is: its innermost frame, and the innermost ones of this package."""
    own = [frame for frame in frames if frame.f_code.co_filename.startswith(f"{_PACKAGE}/")]
    shown = dict.fromkeys([*frames[:1], *own[:3]])
    return "in " + " < ".join(f"{frame.f_code.co_name} ({_file(frame)}:{frame.f_lineno})" for frame in shown)


def _file(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(_PACKAGE.parent)) if _PACKAGE in path.parents else "/".join(path.parts[-2:])
