"""Stopping on request: a signal to any one rank ends the run on all ranks after the same step."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal asked this rank to stop; the ranks agree at the end of each step.

    Install it before DeepSpeed starts: a scheduler's warning can come early.
    """

    def __init__(self):
        self.signal: str | None = None
        self._previous = {}

    def install(self) -> "StopRequest":
        """Take over SIGTERM, SIGINT and SIGUSR1. A second SIGINT interrupts at once."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def remove(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self.signal is not None
