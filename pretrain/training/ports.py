"""Where ranks of one machine can meet."""

import socket


def free_port() -> int:
    """Return the number of a TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
