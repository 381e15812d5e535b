"""What those who start ranks and the ranks themselves agree on."""

import socket

RESTART = "MEDLEY_RESTART"
"""Environment variable: how often the run has been started anew after a failure."""


def free_port() -> int:
    """Return the number of a TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
